"""Expands modules that torch.fx would keep as one opaque leaf into ops that have rules: torch's transformer layers.

The parameters stay in place and keep their names. The traced graph consists of torch functions, so the code generated
from it does not depend on fxmerge. Each function below takes the module and the arguments of its call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multihead_attention(
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, None]:
    """nn.MultiheadAttention, as three projections and scaled_dot_product_attention over the heads.

    Inputs are (batch, tokens, channels) or, without batch_first, (tokens, batch, channels). The attention weights are
    not returned. Raises NotImplementedError for forms that are not covered; the module then stays a leaf.
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise NotImplementedError("bias_k and add_zero_attn")
    same = query is key and key is value
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    heads = module.num_heads
    like: Any = module.out_proj._parameters["weight"]  # the tensor; attribute access would return a proxy
    mask = _joined(_additive(attn_mask, heads, like), _additive(key_padding_mask, heads, like, padding=True))
    if module.in_proj_weight is not None and same:
        q, k, v = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    else:
        weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        (w_q, w_k, w_v), b_q, b_k, b_v = weights, None, None, None
        if module.in_proj_weight is not None:
            w_q, w_k, w_v = module.in_proj_weight.chunk(3)  # unpacked directly, since a trace must know their number
        if module.in_proj_bias is not None:
            b_q, b_k, b_v = module.in_proj_bias.chunk(3)
        q, k, v = F.linear(query, w_q, b_q), F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)
    q, k, v = (torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    drops = {"dropout_p": module.dropout} if module.training and module.dropout else {}
    given = (q, k, v) if mask is None else (q, k, v, mask)
    out = F.scaled_dot_product_attention(*given, **drops)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return out if module.batch_first else out.transpose(0, 1), None


def _additive(mask: Any, heads: int, like: Tensor, padding: bool = False) -> Tensor | None:
    """A mask that the model creates, as what is added to the scores: (tokens, tokens) or (batch, heads, ...)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError("a mask that depends on the inputs, whose dtype is unknown during tracing")
    added = torch.zeros(mask.shape).masked_fill(mask.cpu(), -torch.inf) if mask.dtype == torch.bool else mask
    added = added.to(like)
    if padding:
        return added[:, None, None, :]
    return added.reshape(-1, heads, *added.shape[1:]) if added.dim() == 3 else added


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two masks, either of which may be None."""
    return other if one is None else one if other is None else one + other


def encoder_layer(
    module: nn.TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Any:
    """nn.TransformerEncoderLayer. `is_causal` is ignored, since it only describes the mask."""
    attended = (module.self_attn, module.dropout1, src_mask, src_key_padding_mask)
    fed = (module.linear1, module.dropout, module.linear2, module.dropout2)
    if module.norm_first:
        src = src + _attended(attended, module.norm1(src))
        return src + _fed(module, fed, module.norm2(src))
    src = module.norm1(src + _attended(attended, src))
    return module.norm2(src + _fed(module, fed, src))


def decoder_layer(
    module: nn.TransformerDecoderLayer,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Any:
    """nn.TransformerDecoderLayer: like `encoder_layer`, with attention to the memory in between."""
    own = (module.self_attn, module.dropout1, tgt_mask, tgt_key_padding_mask)
    across = (module.multihead_attn, module.dropout2, memory_mask, memory_key_padding_mask)
    fed = (module.linear1, module.dropout, module.linear2, module.dropout3)
    if module.norm_first:
        tgt = tgt + _attended(own, module.norm1(tgt))
        tgt = tgt + _attended(across, module.norm2(tgt), memory)
        return tgt + _fed(module, fed, module.norm3(tgt))
    tgt = module.norm1(tgt + _attended(own, tgt))
    tgt = module.norm2(tgt + _attended(across, tgt, memory))
    return module.norm3(tgt + _fed(module, fed, tgt))


def _attended(branch: tuple[Any, Any, Any, Any], x: Any, memory: Any = None) -> Any:
    """The attention branch of a layer, (attention, dropout, mask, padding): to the memory, or to `x` itself."""
    attention, dropout, mask, padding = branch
    seen = x if memory is None else memory
    return dropout(attention(x, seen, seen, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0])


def _fed(module: Any, branch: tuple[Any, Any, Any, Any], x: Any) -> Any:
    """The feed-forward branch of a layer, (linear, dropout, linear, dropout)."""
    first, dropout, second, last = branch
    return last(second(dropout(module.activation(first(x)))))


def encoder(
    module: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    """nn.TransformerEncoder: its layers one after another."""
    for layer in module.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if module.norm is None else module.norm(src)


def decoder(module: nn.TransformerDecoder, tgt: Any, *given: Any, **masks: Any) -> Any:
    """nn.TransformerDecoder: its layers one after another, each called with the decoder's own arguments."""
    for layer in module.layers:
        tgt = layer(tgt, *given, **masks)
    return tgt if module.norm is None else module.norm(tgt)


def transformer(
    module: nn.Transformer,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: Any = None,
    tgt_is_causal: Any = None,
    memory_is_causal: bool = False,
) -> Any:
    """nn.Transformer: the encoder, then the decoder."""
    memory = module.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    padding = {"tgt_key_padding_mask": tgt_key_padding_mask, "memory_key_padding_mask": memory_key_padding_mask}
    return module.decoder(tgt, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, **padding)


EXPANSIONS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: multihead_attention,
    nn.TransformerEncoderLayer: encoder_layer,
    nn.TransformerDecoderLayer: decoder_layer,
    nn.TransformerEncoder: encoder,
    nn.TransformerDecoder: decoder,
    nn.Transformer: transformer,
}


def expansion_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that expands a module, or None."""
    return EXPANSIONS.get(type(module))
