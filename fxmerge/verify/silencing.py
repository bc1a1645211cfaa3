"""The silence oracle: the merged model against a copy of the user's model in which the dropped channels are zero.

Dropping a channel must do what setting it to zero does. A channel is silenced at both ends: the rows and biases that
produce it and its own parameters in norms and offsets become zero, and so do the columns of the weights that read it,
since a function such as the sigmoid may turn zero into something else in between. All of this is done to the parameters
of the user's model, by their paths; the model is then run as the user wrote it. No label and no graph takes part in
that, so that the oracle also detects what tracing has made constant, and a constant that follows a width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fxmerge.analysis.grouping import Chosen, provable
from fxmerge.capture.frozen import restored
from fxmerge.capture.parametrizations import computed_weights, unparametrize
from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.compare import difference, outputs
from fxmerge.ir.capture import FOLDED, Capture
from fxmerge.ir.groups import Group, Grouping, Member, survivors
from fxmerge.ir.provenance import Provenance
from fxmerge.plan import Plan, planned
from fxmerge.rewrite.rewriter import Rewriter
from fxmerge.verify.at_zero import AtZero
from fxmerge.verify.in_double import double_precision, doubled, in_float64, whole, wide, widened
from fxmerge.verify.unseen import Unseen, unseen
from fxmerge.weights.by_path import at
from fxmerge.weights.copy import deep_copy
from fxmerge.weights.layout import columns, from_columns, from_out_first, out_first

_FOLDED_IN_FLOAT32 = 1e-4  # the error that folded values may cause
_UNCHANGED = ("scale", "table", "prelu")  # per-channel parameters that leave a zero as it is, or are not values


@dataclass(frozen=True)
class Silence:
    """What `silence` found.

    errors:    |merged - silenced| / |silenced| over all outputs, by group; "all" is for all groups together
    left_out:  groups that could not be checked -> why
    inputs:    the unseen inputs on which "all" was compared, such as "values" and "batch 3"
    refused:   inputs that the user's model takes and the captured graph does not -> the error that it raises
    on_graph:  groups that were silenced in the captured graph, not in the user's model: because one of their weights
               is not a parameter of the model, because the graph has values that were computed from parameters in
               float32 (it is then compared with the model to 1e-4), or because the model does not run in float64
    """

    errors: Mapping[str, float]
    left_out: Mapping[str, str]
    inputs: tuple[str, ...]
    refused: Mapping[str, str]
    on_graph: tuple[str, ...]


def silence(
    captured: Capture, facts: Provenance, grouping: Grouping, plan: Plan, *, each: bool = True,
    inputs: Sequence[Unseen] | None = None, seed: int = 0,
) -> Silence:  # fmt: skip
    """The merged model against the silenced one, in float64, on unseen inputs; errors are about 1e-15 if all is right.

    plan:    which channels are kept; the others are dropped as by decomposition="prune" and refit="none", whatever the
             plan's options say. With no group in it, the captured graph itself is compared with the model.
    each:    also check every group alone, on the first of the inputs
    inputs:  the inputs to compare on; by default `unseen` of the example inputs. Those that the model does not take are
             passed over.

    Groups with a mixer are left out, since their other channels change without the dropped ones. So are groups with a
    function that is not finite at zero, and groups that are summed without a weight (queries times keys) after a
    function that is not zero at zero. Raises FxMergeError for a model on the meta device.
    """
    module, args, kwargs = in_float64(captured)
    chosen, left_out = _silent(captured, facts, grouping, planned(grouping.everything, plan))
    given = tuple(unseen(args, kwargs, seed) if inputs is None else inputs)
    original = _original(captured, chosen, Unseen("example", args, kwargs)) if captured.cut is None else None
    check = _Check(captured, facts, grouping, module)
    errors: dict[str, float] = {}
    if original is not None and any(FOLDED in node.meta for node in captured.module.graph.nodes):
        error = check.error([], given[:1], original)[1]
        if error is not None and error > _FOLDED_IN_FLOAT32:
            errors["all"] = error
        original = None
    there = {g.name for g, _ in chosen if original is not None and _has(original(), g)}
    subjects = [("all", [(g, kept) for g, kept in chosen if g.name in there], original)]
    subjects.append(("all", [(g, kept) for g, kept in chosen if g.name not in there], None))
    if each:
        subjects += [(g.name, [(g, kept)], original if g.name in there else None) for g, kept in chosen]
    for name, some, reference in subjects:
        if not some and reference is None:
            continue
        refused, error = check.error(some, given if name == "all" else given[:1], reference)
        left_out |= refused
        if error is not None:
            errors[name] = max(error, errors.get(name, 0.0))
    left_out = {name: why for name, why in left_out.items() if name not in errors}
    on_graph = tuple(g.name for g, _ in chosen if g.name not in there)
    return Silence(errors, left_out, tuple(check.compared), check.refused, on_graph)


def silenced(captured: Capture, grouping: Grouping, plan: Plan) -> nn.Module:
    """A float64 copy of the user's model in which the channels that a plan drops are zero.

    Raises FxMergeError where a weight of a group is not a parameter of the user's model.
    """
    if captured.model is None:
        raise FxMergeError("the model that was captured is not known; only its graph is")
    model = _copied(captured.model)
    for group, kept in planned(grouping.everything, plan):
        if not _has(model, group):
            raise FxMergeError(f"{group.name}: a weight is not a parameter of the model, but computed from others")
        set_to_zero(partial(_tensor, model), group, kept)
    return model


class _Reweighted(nn.Module):
    """The user's own model, not changed, run with other weights: a copy would not share what its hooks hold."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # each tensor of each module once: functional_call does not restore a module that is given under two names
        held = [
            (f"{path}.{name}".lstrip("."), (module, name), tensor)
            for path, module in model.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]
        copies = {id(t): t.detach().clone() for _, _, t in held}  # tied tensors stay tied
        for key, tensor in copies.items():
            copies[key] = wide(tensor)
        self.given = {path: copies[id(t)] for path, _, t in held}
        self.tensors: dict[tuple[nn.Module, str], Tensor] = {place: copies[id(t)] for _, place, t in held}

    def find(self, path: str) -> Tensor:
        """The float64 tensor in place of the model's at a path, of which a shared module has several."""
        owner, _, name = path.rpartition(".")
        return self.tensors[self.model.get_submodule(owner), name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with restored(self.model):  # its code may keep values from call to call, and change what it does by them
            return torch.func.functional_call(self.model, self.given, args, kwargs, tie_weights=False)


class _Check:
    """Compares merged and silenced models for some of the groups at a time."""

    def __init__(self, captured: Capture, facts: Provenance, grouping: Grouping, module: fx.GraphModule) -> None:
        self.captured, self.facts, self.grouping, self.module = captured, facts, grouping, module
        self.compared: dict[str, None] = {}
        self.refused: dict[str, str] = {}

    def error(
        self, chosen: Chosen, inputs: Sequence[Unseen], original: Callable[[], nn.Module] | None
    ) -> tuple[dict[str, str], float | None]:
        """(why groups cannot be checked, by name; the largest error of the others, None if nothing was compared).

        original: makes the user's model in float64, to be silenced; None if the graph is silenced instead
        """
        chosen, edits, refusals = provable(self.captured, self.facts, self.grouping, chosen)
        left_out = {refusal.name: refusal.reason for refusal in refusals}
        if refusals and not chosen:
            return left_out, None
        dead = original() if original is not None else copy.deepcopy(self.module)
        for group, kept in chosen:
            set_to_zero(partial(_tensor, dead), group, kept)
        dead = whole(self.captured, dead) if isinstance(dead, fx.GraphModule) and original is None else dead
        rewriter = Rewriter(self.module, self.facts)  # the original, so that zeros cannot hide what is sliced wrongly
        merged = whole(self.captured, rewriter.finish(survivors(self.grouping, chosen), edits))
        found: list[float] = []
        problems: list[str] = []
        for given in inputs:
            expected = _run(dead, given)
            if isinstance(expected, Exception):
                problems.append(f"the model does not run on other inputs: {first_line(expected)}")
            elif given.batch is not None and not self._follows(expected, *given.batch):
                problems.append("the model's outputs do not follow the batch size")
            elif not all(bool(torch.isfinite(t).all()) for t in expected):
                problems.append("the model's outputs are not finite without its dropped channels")
            elif not any(bool(t.any()) for t in expected):
                problems.append("the model's outputs are all zero without its dropped channels")
            else:
                found += self._compare(merged, expected, given)
        if not found:
            left_out |= {g.name: problems[0] if problems else "the graph takes no other inputs" for g, _ in chosen}
        return left_out, max(found, default=None)

    def _follows(self, expected: list[Tensor], before: int, after: int) -> bool:
        """Do the outputs have as many samples? With a literal batch size, channels would be spread over samples."""
        pairs = zip(expected, self.captured.outputs, strict=False)
        return all(one.shape[:1] == (after,) for one, example in pairs if example.shape[:1] == (before,))

    def _compare(self, merged: nn.Module, expected: list[Tensor], given: Unseen) -> list[float]:
        """The error on one input, in a list that is empty where the captured graph does not take the input."""
        actual = _run(merged, given)
        if isinstance(actual, Exception):
            unmerged = _run(whole(self.captured, self.module), given)
            if not isinstance(unmerged, Exception):
                return [float("inf")]  # the graph takes it, and the merged graph does not
            self.refused[given.name] = first_line(unmerged)
            return []
        self.compared[given.name] = None
        return [difference(expected, actual)]


def _run(module: nn.Module, given: Unseen) -> list[Tensor] | Exception:
    """The outputs on some inputs, or what the model raised."""
    try:
        with double_precision():
            return outputs(module, doubled(given.args), doubled(dict(given.kwargs)))
    except Exception as error:
        return error


def _silent(captured: Capture, facts: Provenance, grouping: Grouping, chosen: Chosen) -> tuple[Chosen, dict[str, str]]:
    """The groups that can be silenced; and why the others cannot, by name."""
    left_out: dict[str, str] = {}
    for part in grouping.parts:
        mine, followed = {g.name for g in part.groups}, AtZero(captured, facts, part)
        left_out |= {g.name: followed.reason(g) for g, _ in chosen if g.name in mine}
    left_out = {name: why for name, why in left_out.items() if why}
    return [(g, kept) for g, kept in chosen if g.name not in left_out], left_out


def _original(captured: Capture, chosen: Chosen, example: Unseen) -> Callable[[], nn.Module] | None:
    """What makes the user's model in float64, with as many weights of the groups as can be; None if it does not run."""
    if captured.model is None:
        return None
    plain, model = partial(_Reweighted, captured.model), captured.model
    # a copy has the weights that hooks and parametrizations compute as parameters
    computed = any(parametrize.is_parametrized(m) for m in nn.Module.modules(model)) or computed_weights(model)
    make: Callable[[], nn.Module] = partial(_copied, model) if computed else plain
    return None if isinstance(_run(make(), example), Exception) else make


def _copied(model: nn.Module) -> nn.Module:
    copied = deep_copy(model, computed_weights(model))
    unparametrize(copied)
    return widened(copied)


def _has(model: nn.Module, group: Group) -> bool:
    try:
        return all(isinstance(_tensor(model, p), Tensor) for m in _members(group) for p in m.layer.params.values())
    except (AttributeError, KeyError):
        return False


def _tensor(model: nn.Module, path: str) -> Tensor:
    return model.find(path) if isinstance(model, _Reweighted) else at(model, path)


def _members(group: Group) -> tuple[Member, ...]:
    return (*group.producers, *group.per_channel_params, *group.consumers)


@torch.no_grad()
def set_to_zero(find: Callable[[str], Tensor], group: Group, kept: Tensor) -> None:
    """Zeroes the channels of a group that are not kept: in its producers, per-channel parameters and consumers.

    find: gives the tensor at a path, to be written in place
    """
    stays = torch.zeros(group.channels, dtype=torch.bool).index_fill_(0, kept, True)
    dropped = (~stays).nonzero().flatten()
    for member in _members(group):
        places = member.where[member.local(dropped)[1]].flatten()
        layer, op = member.layer, member.layer.operation
        if member.role == "read":
            weight = find(layer.params["weight"])
            weight.copy_(from_columns(columns(weight, layer).clone().index_fill_(0, places, 0), weight, layer))
            continue
        if op.name in _UNCHANGED:
            continue
        for slot, path in layer.params.items():
            value = find(path)
            if slot == "running_var" or (slot == "running_mean" and "weight" in layer.params):
                continue  # the norm's own weight and bias silence it
            if op.is_elementwise:
                value.copy_(value.flatten().index_fill_(0, places, 0).view(value.shape))
            else:
                by_rows = slot == "weight" and member.role == "write"
                rows = (out_first(value, layer) if by_rows else value).clone().index_fill_(0, places, 0)
                value.copy_(from_out_first(rows, value, layer) if by_rows else rows)
