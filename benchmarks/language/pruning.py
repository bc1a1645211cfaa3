"""Baselines that prune channels: Wanda for structures, second-order elimination with a ridge solve, and FLAP.

All are given the share of the decoder layers' parameters to remove, and narrow the model in place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.language.llama import (
    State,
    after_attention,
    attention_values,
    columns_of,
    decoder_layers,
    entering,
    hidden_channels,
    keep_channels,
    keep_heads,
    layer_parameters,
    set_weight,
)

Batches = Sequence[Mapping[str, Tensor]]
# (weight that reads the channels, its inputs, blocks to keep, channels of a block)
# -> the kept channels, and the weight that reads them
Choice = Callable[[Tensor, Sequence[Tensor], int, int], tuple[Tensor, Tensor]]

RIDGE = 0.03  # times the mean of the diagonal of the second moments
STEP = 16  # channels that are eliminated at a time


@torch.no_grad()
def prune(model: nn.Module, batches: Batches, removed: float, choice: Choice) -> nn.Module:
    """Narrow all layers alike, one after the other: whole heads as far as they go into the share, and MLPs.

    Each layer sees the hidden states that the narrowed layers before it give. As in Wanda-sp, a layer loses the share
    `removed` of its heads, rounded down; MLPs lose what is left to remove.
    """
    layers = decoder_layers(model)
    heads = int(removed * key_value_heads(layers[0].self_attn))
    share = kept_share(model, removed, heads)
    states = entering(model, batches)
    for layer in layers:
        attention, down = layer.self_attn, layer.mlp.down_proj
        if heads:
            count = key_value_heads(attention)
            size = attention.o_proj.in_features // count
            values = [attention_values(layer, state) for state in states]
            kept, weight = choice(attention.o_proj.weight, values, count - heads, size)
            keep_heads(attention, kept[::size] // size)
            set_weight(attention.o_proj, weight)
            hidden = [s.hidden + attention.o_proj(v[..., kept]) for v, s in zip(values, states, strict=True)]
        else:
            hidden = [after_attention(layer, state) for state in states]
        inputs = [hidden_channels(layer, h) for h in hidden]
        kept, weight = choice(down.weight, inputs, max(1, round(share * down.in_features)), 1)
        keep_channels(layer.mlp, kept)
        set_weight(down, weight)
        states = [
            State(h + down(x[..., kept]), state.arguments) for h, x, state in zip(hidden, inputs, states, strict=True)
        ]
    return model


def key_value_heads(attention: nn.Module) -> int:
    return attention.k_proj.out_features // attention.head_dim


def kept_share(model: nn.Module, removed: float, heads: int = 0) -> float:
    """The share of their channels that MLPs keep if the share `removed` of the layers' parameters leaves.

    heads:  key-value heads that leave in each layer, with their queries
    """
    layers = decoder_layers(model)
    mlps = sum(p.numel() for layer in layers for p in layer.mlp.parameters())
    attentions = (layer.self_attn for layer in layers)
    by_heads = sum(heads * cost_of_each(attention, key_value_heads(attention)) for attention in attentions)
    share = 1 - (removed * layer_parameters(model) - by_heads) / mlps
    if share <= 0:
        raise ValueError(f"the MLPs have too few parameters to remove {removed:.0%} of the layers'")
    return share


def wanda(weight: Tensor, inputs: Sequence[Tensor], keep: int, size: int = 1) -> tuple[Tensor, Tensor]:
    """Keep the blocks with the largest sum of norms of the weight's columns times norms of their inputs.

    Nothing is re-solved. Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, with
    columns in place of weights, as in the Wanda-sp of An et al.
    """
    energy = sum(x.flatten(0, -2).double().square().sum(0) for x in inputs)
    score = weight.double().norm(dim=0) * energy.sqrt()
    kept = columns_of(score.unflatten(0, (-1, size)).sum(1).topk(keep).indices.sort().values, size)
    return kept, weight[:, kept]


def second_order(weight: Tensor, inputs: Sequence[Tensor], keep: int, size: int = 1) -> tuple[Tensor, Tensor]:
    """Eliminate the blocks whose loss is smallest if all others are re-solved; then solve the weight with a ridge.

    The elimination is Optimal Brain Surgeon for columns (Hassibi and Stork, 1993), as in ZipLM (Kurtic et al., NeurIPS
    2023) and SlimGPT (Ling et al., NeurIPS 2024). The ridge draws towards the original weight.
    """
    moments = second_moments(inputs)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    kept = columns_of(eliminate(weight.double(), torch.linalg.inv(moments), keep, size), size)
    solved = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ weight.double().T).T
    return kept, solved


def second_moments(inputs: Sequence[Tensor]) -> Tensor:
    """The sum of x x^T over all positions of all batches, in float64."""
    total = torch.zeros(inputs[0].shape[-1], inputs[0].shape[-1], dtype=torch.float64)
    for x in inputs:
        rows = x.flatten(0, -2)
        total += rows.T @ rows
    return total


def eliminate(weight: Tensor, inverse: Tensor, keep: int, size: int = 1, step: int | None = None) -> Tensor:
    """The `keep` blocks that stay if those of smallest loss leave, `step` of them at a time.

    inverse:  of the second moments of the inputs

    The loss of a block of columns W_b is tr(W_b inverse_bb^-1 W_b^T). The weight and the inverse follow each step as if
    the remaining columns were re-solved.
    """
    step = step or max(1, STEP // size)
    kept = torch.arange(len(inverse) // size)
    while len(kept) > keep:
        blocks = inverse.reshape(len(kept), size, len(kept), size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = weight.T.reshape(len(kept), size, -1)
        loss = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
        stays = torch.ones(len(kept), dtype=torch.bool)
        stays[loss.topk(min(step, len(kept) - keep), largest=False).indices] = False
        kept, stays = kept[stays], stays.repeat_interleave(size)
        rows = inverse[~stays]
        carried = torch.linalg.solve(rows[:, ~stays], rows[:, stays])
        weight = weight[:, stays] - weight[:, ~stays] @ carried
        inverse = inverse[stays][:, stays] - rows[:, stays].T @ carried
    return kept


@torch.no_grad()
def flap(model: nn.Module, batches: Batches, removed: float, heads: bool = True) -> nn.Module:
    """Remove what fluctuates least, heads and channels of all layers together; its mean goes into a bias.

    An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024: the metric WIFV
    standardised in each layer (that of heads is squared before and averaged after, as in the published code), one
    threshold for all layers, and bias compensation. Activations are those of the original model. Under grouped queries
    a key-value head leaves with the queries that read it. A layer keeps at least one head and one channel.

    heads:  False if all heads stay and only channels of MLPs leave
    """
    layers = decoder_layers(model)
    means, variances = input_statistics(model, batches)
    scores, costs = [], []
    for layer in layers:
        attention, down = layer.self_attn, layer.mlp.down_proj
        metric = fluctuation(attention.o_proj, variances[attention.o_proj]).square()
        per_head = standardised(metric).reshape(key_value_heads(attention), -1).mean(1)
        scores += [per_head if heads else torch.full_like(per_head, torch.inf)]
        scores += [standardised(fluctuation(down, variances[down]))]
        costs += [cost_of_each(attention, len(per_head)), cost_of_each(layer.mlp, down.in_features)]
    kept = iter(within_budget(scores, costs, removed * layer_parameters(model)))
    for layer in layers:
        attention, mlp, (head, channel) = layer.self_attn, layer.mlp, (next(kept), next(kept))
        columns = columns_of(head, attention.head_dim * attention.num_key_value_groups)
        compensate(attention.o_proj, means[attention.o_proj], columns)
        compensate(mlp.down_proj, means[mlp.down_proj], channel)
        keep_heads(attention, head)
        keep_channels(mlp, channel)
    return model


def input_statistics(model: nn.Module, batches: Batches) -> tuple[dict[nn.Linear, Tensor], dict[nn.Linear, Tensor]]:
    """Mean and variance of each input channel of every `o_proj` and `down_proj`, in float64."""
    sums: dict[nn.Linear, list[Tensor]] = {}  # number of positions, sum, sum of squares

    def observe(linear: nn.Linear, args: tuple[Tensor]) -> None:
        x = args[0].flatten(0, -2).double()
        found = [torch.tensor(len(x), dtype=torch.float64), x.sum(0), x.square().sum(0)]
        sums[linear] = [a + b for a, b in zip(sums[linear], found, strict=True)] if linear in sums else found

    linears = [linear for layer in decoder_layers(model) for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    handles = [linear.register_forward_pre_hook(observe) for linear in linears]
    try:
        for batch in batches:
            model.model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    means = {linear: total / count for linear, (count, total, _) in sums.items()}
    return means, {
        linear: (squares / count - means[linear].square()).clamp(min=0) for linear, (count, _, squares) in sums.items()
    }


def fluctuation(linear: nn.Linear, variance: Tensor) -> Tensor:
    """Variance of each input channel times the squared norm of the weight's column (WIFV)."""
    return variance * linear.weight.double().square().sum(0)


def standardised(metric: Tensor) -> Tensor:
    return (metric - metric.mean()) / metric.std()


def cost_of_each(module: nn.Module, blocks: int) -> float:
    """The parameters in the linear layers of a module that leave with one of its `blocks` heads or channels."""
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears) / blocks


def within_budget(scores: Sequence[Tensor], costs: Sequence[float], removed: float) -> Iterable[Tensor]:
    """What each entry of `scores` keeps if the lowest scores of all leave until their costs sum to about `removed`."""
    protected = [score.clone() for score in scores]
    for score in protected:
        score[score.argmax()] = torch.inf
    together = torch.cat(protected)
    order = together.argsort()
    each = torch.cat([torch.full((len(s),), cost, dtype=torch.float64) for s, cost in zip(scores, costs, strict=True)])
    spent = torch.cat([torch.zeros(1, dtype=torch.float64), each[order].cumsum(0)])
    count = int((spent - removed).abs().argmin())
    if not together[order[:count]].isfinite().all():
        raise ValueError(f"{removed:.0f} parameters cannot be removed if each layer keeps a head and a channel")
    stays = torch.ones(len(together), dtype=torch.bool)
    stays[order[:count]] = False
    return [part.nonzero().flatten() for part in stays.split([len(score) for score in scores])]


def compensate(linear: nn.Linear, mean: Tensor, kept: Tensor) -> None:
    """Add what the channels that leave write on average to the bias."""
    leaves = torch.ones(len(mean), dtype=torch.bool)
    leaves[kept] = False
    if leaves.any():
        constant = linear.weight[:, leaves].double() @ mean[leaves]
        if linear.bias is not None:
            constant += linear.bias
        linear.bias = nn.Parameter(constant.to(linear.weight.dtype), requires_grad=False)
