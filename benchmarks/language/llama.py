"""Decoders of the Llama layout in transformers (Llama, Mistral, Qwen2, SmolLM, ...): how they run and are narrowed.

`model.model.layers` are layers that compute

    h = x + self_attn(input_layernorm(x))
    y = h + mlp(post_attention_layernorm(h))         mlp(z) = down_proj(act_fn(gate_proj(z)) * up_proj(z))

Pruners run one layer at a time on the hidden states of the calibration tokens, so that each layer is measured on what
the pruned layers before it give.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = "model.layers."  # the names of what is in the decoder layers begin with this
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


@dataclass
class State:
    """The hidden states of a batch, and the other arguments of each layer (rotary embeddings, mask)."""

    hidden: Tensor
    arguments: Mapping[str, Any]


class _EnteredError(Exception):
    """Ends a forward pass at the first layer."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers. Raises ValueError if they do not have the parts of a Llama layer."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    if not len(layers) or any({name for name, _ in layer.named_children()} != {*PARTS} for layer in layers):
        raise ValueError(f"{type(model).__name__} is not a decoder of the Llama layout; its layers need {PARTS}")
    return layers


def layer_parameters(model: nn.Module) -> int:
    """Number of elements of the parameters in the decoder layers."""
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(LAYERS))


@torch.no_grad()
def entering(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[State]:
    """What reaches the first layer for each batch.

    Raises ValueError if the layer does not compute the formula above, as where it scales its branches.
    """
    found: list[State] = []
    first = decoder_layers(model)[0]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = (*args, *([kwargs.pop("hidden_states")] if not args else []))
        assert not rest, "transformers passes all but the hidden states by keyword"
        found.append(State(hidden, kwargs))
        raise _EnteredError

    handle = first.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for batch in batches:
            with suppress(_EnteredError):
                model(**batch, use_cache=False)
    finally:
        handle.remove()
    for state in found[:1]:
        hidden = after_attention(first, state)
        ours = hidden + first.mlp.down_proj(hidden_channels(first, hidden))
        theirs = first_output(first(state.hidden, **state.arguments))
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
            raise ValueError(f"{type(first).__name__} does not compute what a Llama layer does")
    return found


def after_attention(layer: nn.Module, state: State) -> Tensor:
    """The hidden states between attention and MLP."""
    attention = layer.self_attn(hidden_states=layer.input_layernorm(state.hidden), **state.arguments)
    return state.hidden + first_output(attention)


def attention_values(layer: nn.Module, state: State) -> Tensor:
    """The inputs of `o_proj`: the values that the queries of each head have read."""
    found: list[Tensor] = []
    handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    after_attention(layer, state)
    handle.remove()
    return found[0]


def hidden_channels(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The inputs of `down_proj`, given the hidden states after attention."""
    mlp, z = layer.mlp, layer.post_attention_layernorm(hidden)
    return mlp.act_fn(mlp.gate_proj(z)) * mlp.up_proj(z)


def first_output(output: Any) -> Tensor:
    """The output of a layer or an attention, which may come in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def keep_channels(mlp: nn.Module, kept: Tensor) -> None:
    """Narrow an MLP to the hidden channels `kept`, in place."""
    for linear in (mlp.gate_proj, mlp.up_proj):
        keep_rows(linear, kept)
    set_weight(mlp.down_proj, mlp.down_proj.weight[:, kept])


def keep_heads(attention: nn.Module, kept: Tensor) -> None:
    """Narrow an attention to the key-value heads `kept` and the queries that read them, in place."""
    size = attention.head_dim
    heads = attention.k_proj.out_features // size
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        keep_rows(linear, columns_of(kept, linear.out_features // heads))
    columns = columns_of(kept, attention.o_proj.in_features // heads)
    set_weight(attention.o_proj, attention.o_proj.weight[:, columns])


def columns_of(blocks: Tensor, size: int) -> Tensor:
    """The channels of blocks of `size` channels each, in order."""
    return (blocks[:, None] * size + torch.arange(size)).flatten()


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Narrow the output of a linear layer, in place."""
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[kept].clone(), requires_grad=False)
    set_weight(linear, linear.weight[kept])


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give a linear layer another weight, of any size, in its dtype."""
    linear.weight = nn.Parameter(weight.detach().to(linear.weight.dtype).clone(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
