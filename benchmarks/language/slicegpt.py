"""SliceGPT: the residual stream is rotated to its principal components, and the smallest of them are sliced off.

Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, ICLR 2024. A norm without a
weight commutes with rotations: norm(x Q) = norm(x) Q for orthogonal Q. So the weights of norms go into the layers that
read them. The stream has its own Q before each norm; the layers before and after it are rotated, and each add gets the
matrix Q_before^T Q_after for the stream that passes by the layer. As in the published code, Q is computed on what the
sliced layers before it give, and the stream that the head reads is rotated but not sliced.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language.llama import State, decoder_layers, entering, first_output, layer_parameters, set_weight
from benchmarks.language.pruning import Batches


class Norm(nn.Module):
    """RMSNorm without a weight. The mean is over the original width: components that were sliced off count as zero."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)


class Rotated(nn.Module):
    """A decoder layer whose norms have no weights, with a matrix in each of its two adds."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        absorb(layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj))
        absorb(layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj))
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = Norm(width, layer.input_layernorm.variance_epsilon)
        self.post_attention_layernorm = Norm(width, layer.post_attention_layernorm.variance_epsilon)
        self.past_attention = parameter(torch.eye(width))
        self.past_mlp = parameter(torch.eye(width))

    def attend(self, hidden: Tensor, **arguments: Any) -> Tensor:
        attention = self.self_attn(hidden_states=self.input_layernorm(hidden), **arguments)
        return hidden @ self.past_attention + first_output(attention)

    def feed(self, hidden: Tensor) -> Tensor:
        return hidden @ self.past_mlp + self.mlp(self.post_attention_layernorm(hidden))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self.feed(self.attend(hidden_states, **arguments))


@torch.no_grad()
def slicegpt(model: nn.Module, batches: Batches, width: int) -> nn.Module:
    """Rotate and slice the residual stream to `width` components, in place.

    Embedding and head are no longer tied, since they read and write different rotations.
    """
    layers, core, full = decoder_layers(model), model.model, model.config.hidden_size
    states = entering(model, batches)
    sliced = components(state.hidden for state in states)[:, :width]
    core.embed_tokens.weight = parameter(core.embed_tokens.weight.double() @ sliced)
    core.embed_tokens.embedding_dim = width
    states = [State(state.hidden @ sliced.float(), state.arguments) for state in states]
    for number, layer in enumerate(layers):
        rotated = layers[number] = Rotated(layer, full)
        attention, mlp = rotated.self_attn, rotated.mlp

        rotate_inputs((attention.q_proj, attention.k_proj, attention.v_proj), sliced)
        rotated.past_attention = parameter(sliced.T)  # back to the original basis, for what follows
        hidden = [rotated.attend(state.hidden, **state.arguments) for state in states]
        after = components(hidden)[:, :width]
        rotate_output(attention.o_proj, after)
        rotated.past_attention = parameter(sliced.T @ after)
        hidden = [h @ after.float() for h in hidden]

        rotate_inputs((mlp.gate_proj, mlp.up_proj), after)
        rotated.past_mlp = parameter(after.T)
        hidden = [rotated.feed(h) for h in hidden]
        last = number == len(layers) - 1
        sliced = components(hidden)[:, : None if last else width]
        rotate_output(mlp.down_proj, sliced)
        rotated.past_mlp = parameter(after.T @ sliced)
        states = [State(h @ sliced.float(), state.arguments) for h, state in zip(hidden, states, strict=True)]
    model.lm_head.weight = parameter(model.lm_head.weight)
    absorb(core.norm.weight, (model.lm_head,))
    rotate_inputs((model.lm_head,), sliced)
    core.norm = Norm(full, core.norm.variance_epsilon)
    model.config.tie_word_embeddings = False
    return model


def components(batches: Iterable[Tensor]) -> Tensor:
    """The principal components of all rows of all batches, largest first, as columns of an orthogonal matrix.

    As in the published code the moments are not centred, and the rows are not normed.
    """
    total: Any = 0
    for batch in batches:
        rows = batch.flatten(0, -2).double()
        total = total + rows.T @ rows
    return torch.linalg.eigh(total).eigenvectors.flip(1)


def absorb(weight: Tensor, linears: Sequence[nn.Linear]) -> None:
    """Scale the inputs of layers by the weight of the norm before them."""
    for linear in linears:
        set_weight(linear, linear.weight.double() * weight.double())


def rotate_inputs(linears: Sequence[nn.Linear], rotation: Tensor) -> None:
    for linear in linears:
        set_weight(linear, linear.weight.double() @ rotation)


def rotate_output(linear: nn.Linear, rotation: Tensor) -> None:
    if linear.bias is not None:
        linear.bias = parameter(linear.bias.double() @ rotation)
    set_weight(linear, rotation.T @ linear.weight.double())


def parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().float().clone(), requires_grad=False)


def sliced_width(model: nn.Module, removed: float) -> int:
    """The width of the residual stream at which the share `removed` of the layers' parameters is gone.

    The matrices in the adds count: 20 % of the parameters need a slice of more than 20 % of the width.
    """
    target, full = (1 - removed) * layer_parameters(model), model.config.hidden_size
    return min(range(1, full + 1), key=lambda width: abs(sliced_parameters(model, width) - target))


def sliced_parameters(model: nn.Module, width: int) -> int:
    """The parameters of the layers at a width of the residual stream."""
    full, count = model.config.hidden_size, 0
    for layer in decoder_layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            count += linear.out_features * (width + (linear.bias is not None))
        for linear in (attention.o_proj, mlp.down_proj):
            count += width * (linear.in_features + (linear.bias is not None))
        count += 2 * width * width
    return count + (full - width) * (width + mlp.down_proj.in_features + (mlp.down_proj.bias is not None))
