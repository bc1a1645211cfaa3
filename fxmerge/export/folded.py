"""The tensors of the user's class from which capture computed others: `t` of `t.exp()`, or `w` of `1 + w`.

The class computes such a tensor at each use, so it needs what the tensor was computed from. If the computed tensor kept
its size, that is what it was in the original. If channels were dropped from it, they are dropped from its sources too,
along the axes on which both have the same places. Running the class then shows whether its outputs are right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxmerge.capture.parametrizations import computed_weights, unparametrize
from fxmerge.ir.capture import FOLDED, Capture
from fxmerge.ir.provenance import ParamLabels
from fxmerge.rewrite.slicing import gather
from fxmerge.weights.by_path import Weights, at
from fxmerge.weights.copy import deep_copy

Labels = Mapping[str, ParamLabels]


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of the user's model in evaluation mode, in which parametrized weights are plain parameters."""
    copied = deep_copy(model, computed_weights(model))
    for module in nn.Module.modules(copied):  # not by .eval(), which raises on an exported graph module
        module.training = False
    unparametrize(copied)
    return copied


def computed(captured: Capture) -> dict[str, tuple[str, ...]]:
    """{path of a tensor that capture computed: paths of the user's tensors that it was computed from}."""
    found = [(str(n.target), n.meta[FOLDED]) for n in captured.module.graph.nodes if FOLDED in n.meta]
    return {path: tuple(sources) for path, sources in found}


def sources(captured: Capture, tensors: Mapping[str, Tensor], labels: Labels, alive: Tensor) -> dict[str, Tensor]:
    """The tensors that the user's class needs besides the merged ones, with the values to give them.

    tensors: the merged model's, by name
    labels:  of the original's parameters, by path
    alive:   bool (label_count,), the labels that stay
    """
    found: dict[str, Tensor] = {}
    folds = computed(captured)
    if captured.model is None or not folds:
        return found
    copied = plain_copy(captured.model)
    # also the buffers that are not in its state_dict, such as the angles of rotary embeddings
    own = dict(copied.named_buffers(remove_duplicate=False)) | copied.state_dict()
    for path, names in folds.items():
        before = at(captured.whole.module, path)
        cut = path in labels and path in tensors and tensors[path].shape != before.shape
        for name in names:
            if name in own and name not in tensors and name not in found:
                value = own[name].detach()
                view = _undone(value, before, tensors[path]) if path in tensors else None
                if view is not None:
                    found[name] = view
                else:
                    found[name] = _narrowed(value, before, labels[path], alive) if cut else value
    return found


def _undone(value: Tensor, before: Tensor, now: Tensor) -> Tensor | None:
    """What a tensor has to be for `now` to be computed from it, if `before` is no more than a view of it; or None."""
    if _alike(value, before) and torch.equal(value.flatten(), before.flatten().to(value)):
        return _reshaped(now, before, value).to(value.dtype)
    if value.dim() == 2 and value.t().shape == before.shape and torch.equal(value.t(), before.to(value)):
        return now.t().to(value.dtype)
    return None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape up to axes of size 1."""
    return [n for n in one.shape if n > 1] == [n for n in other.shape if n > 1]


def _reshaped(now: Tensor, before: Tensor, like: Tensor) -> Tensor:
    """`now`, which `before` became, with the axes of `like`, which has the shape of `before` up to axes of size 1."""
    sizes = iter([new for old, new in zip(before.shape, now.shape, strict=True) if old > 1])
    return now.reshape([next(sizes) if n > 1 else 1 for n in like.shape])


def _narrowed(value: Tensor, like: Tensor, labels: ParamLabels, alive: Tensor) -> Tensor:
    """A tensor without the dropped places of another, which broadcasts with it; unchanged where it has no such axes."""
    if value.shape != like.shape and _alike(value, like):  # as (n,) is used as (1, n, 1, 1)
        return _reshaped(_narrowed(value.reshape(like.shape), like, labels, alive), like, value)
    first = like.dim() - value.dim()
    axes = {
        axis - first: along
        for axis, along in labels.axes.items()
        if axis >= first and value.size(axis - first) == like.size(axis)
    }
    same = value.shape == like.shape
    if (labels.groups > 1 or labels.elements is not None) and not same:
        return value
    holder = nn.Module()
    holder.register_buffer("value", value)
    mine = ParamLabels("value", axes, labels.elements, labels.groups)
    gather(Weights(holder), mine, lambda flat: alive[flat].nonzero().flatten())
    return holder.value  # type: ignore[return-value]


def recomputed(captured: Capture, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """{path: its sources} of the tensors that the class computes from its own ones, if the merge changed either."""
    found = {}
    own = captured.model.state_dict() if captured.model is not None else {}
    for path, names in computed(captured).items():
        before, now = at(captured.whole.module, path), tensors.get(path)
        changed = now is None or now.shape != before.shape or not torch.equal(now.to(before), before)
        cut = [name for name in names if name in tensors and name in own and tensors[name].shape != own[name].shape]
        if changed or cut:
            found[path] = names
    return found
