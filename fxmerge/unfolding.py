"""Unfolding: modules that torch.fx would keep as one opaque leaf, written out in ops that have rules.

The parameters stay where they are and keep their names; the traced graph holds plain torch functions, so the code that
is generated from it needs nothing of fxmerge. Each function takes the module and its call's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


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
    """nn.MultiheadAttention in evaluation mode, its three projections and its heads in the open.

    (batch, tokens, channels) or, without batch_first, (tokens, batch, channels); the weights are not given back.
    Raises NotImplementedError where it is not this plain form; the module then stays a leaf.
    """
    plain = key_padding_mask is None and attn_mask is None and not is_causal and module.bias_k is None
    if not plain or module.add_zero_attn:
        raise NotImplementedError("masks, bias_k and add_zero_attn")
    if not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    heads = module.num_heads
    if module.in_proj_weight is not None and query is key and key is value:
        q, k, v = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    elif module.in_proj_weight is None and module.in_proj_bias is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        q, k, v = (F.linear(t, w) for t, w in zip((query, key, value), weights, strict=True))
    else:
        raise NotImplementedError("a packed projection of different inputs")
    q, k, v = (torch.unflatten(t, -1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    out = module.out_proj(out.transpose(1, 2).flatten(2))
    return out if module.batch_first else out.transpose(0, 1), None


UNFOLDED: dict[type[nn.Module], Callable[..., Any]] = {nn.MultiheadAttention: multihead_attention}


def unfolded(module: nn.Module) -> Callable[..., Any] | None:
    """The function that writes a module out, or None."""
    return UNFOLDED.get(type(module))
