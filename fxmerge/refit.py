"""Refit: the original and the merged graph in lockstep; each layer behind the first merged group is re-solved.

At a linear layer or convolution of the merged graph whose input is no longer the original's, in execution order:

    P   patches of the merged stream at this layer, a sample of all output positions
    T   what the original puts out there, channels that stay, corrected as `targets` tells
    W'  argmin |P W' - T|^2 + ridge |W' - W0|^2, W0 the weight that is there (`systems`)

and the merged stream goes on with W'. Both readers that lost channels and writers whose input has moved are solved.
Where a BatchNorm follows, mean and deviation of its input are then matched to the original's, channel by channel.
A layer is left as it is where the original's outputs come out anyway, where one weight serves several calls, and where
no solution is better than the weight that is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, fx, nn

from . import targets as aims
from .evaluating import evaluating
from .ir import Layer
from .lockstep import Lockstep, Pair, Settings, Step, line, moments
from .patches import Form, at_positions, enough, form_of, input_of, operands, patches, rows_of, sample, weight_of
from .systems import system
from .weights import Weights, at, fetch_bias

EXACT = 1e-10  # relative square error at which a layer needs no refit
MATCH = 2.0  # the moment matching's factor stays between 1 / MATCH and MATCH
RIDGE = 3e-2  # the pull towards the weights that are there, of the Gram's mean diagonal
ROUNDS = 6  # of the alternation behind a rectifier


@dataclass(frozen=True)
class Refitted:
    """What refit did to one layer: relative square error of its outputs before and after, and why it was left alone."""

    name: str
    before: float
    after: float
    note: str = ""


def refit(
    pair: Pair,
    batches: Sequence[Sequence[object]],
    settings: Settings,
    stage: Callable[[str], None] = lambda name: None,
) -> tuple[Refitted, ...]:
    """Re-solve the layers of the pair's merged graph in place, on batches of values of the graph's placeholders.

    Cost: two forward passes, and a product (p, rows) (rows, p) for each layer of p weights an output.
    """
    assert pair.merged is not None
    with evaluating(pair.original, pair.merged), torch.no_grad():
        return _Refit(pair, batches, settings).run(stage)


@dataclass(frozen=True)
class _Rows:
    """A sample of a layer's output positions, by batch."""

    patches: list[Tensor]  # (rows, g, p)
    targets: list[Tensor]  # (rows, o), corrected by the other stream
    others: list[Tensor] | list[None]  # (rows, o) of the merged graph's other stream


class _Refit:
    def __init__(self, pair: Pair, batches: Sequence[Sequence[object]], settings: Settings) -> None:
        assert pair.merged is not None
        self.run_of, self.kept, self.settings = Lockstep(pair, batches, settings), pair.kept, settings
        self.original, self.merged, self.weights = pair.original, pair.merged, Weights(pair.merged)
        facts, self.layers = pair.facts, {layer.node: layer for layer in pair.facts.layers}
        self.norms = {name: layer for name, layer in self.layers.items() if layer.op == "batch_norm"}
        used = Counter(layer.params["weight"] for layer in facts.layers if "weight" in layer.params)
        self.shared = {path for path, times in used.items() if times > 1}
        self.generator = torch.Generator().manual_seed(settings.seed)

    def run(self, stage: Callable[[str], None]) -> tuple[Refitted, ...]:
        moved: dict[str, bool] = {}  # node -> is its value in the merged graph another than the original's?
        records = []
        for step in self.run_of:
            node, layer = step.node, self.layers.get(step.node.name)
            comes = any(moved.get(source.name, False) for source in node.all_input_nodes)
            own = layer is not None and any(self._changed(path) for path in layer.params.values())
            moved[node.name] = comes or own
            if layer is not None and comes and layer.op in aims.SOLVED:
                stage(f"refit {layer.module}")
                records.append(self._solve(step, layer))
        return tuple(records)

    def _changed(self, path: str) -> bool:
        before, now = at(self.original, path), at(self.merged, path)
        return before.shape != now.shape or not torch.equal(before, now)

    def _solve(self, step: Step, layer: Layer) -> Refitted:
        node, path = step.node, layer.params["weight"]
        owner = self.merged.get_submodule(str(node.target)) if node.op == "call_module" else None
        form = form_of(node, layer, owner, self.weights[path])
        if path in self.shared:
            return Refitted(layer.module, 0.0, 0.0, "as it is: one weight serves several calls")
        if form is None:
            return Refitted(layer.module, 0.0, 0.0, "as it is: a call of unknown geometry")
        if not all(isinstance(y, Tensor) and y.is_floating_point() for y in step.outputs):
            return Refitted(layer.module, 0.0, 0.0, "as it is: its outputs are no floating-point tensors")
        found = aims.behind(self.merged, node, self.norms, self._present())
        out_labels = layer.writes if layer.writes is not None else layer.carries
        assert out_labels is not None
        stays = self.kept(out_labels).to(step.outputs[0].device)
        affine = self._affine(node, found, step.outputs, stays)
        inputs = self.run_of.merged.values[input_of(node, layer.op).name]
        start = rows_of(self.weights[path], form).double()
        count = enough(self.settings.rows, start.size(0) * start.size(2))
        index_of = sample(step.outputs, form, count, self.generator, self.settings.reduce)
        rows = self._rows(step, form, index_of, inputs, found, affine, stays)
        held = self._bias(node, layer, owner)
        bias = start.new_zeros(start.shape[:2]) if held is None else held.double().view(start.shape[:2])
        rectified = found.rectified
        scale = self._reduced([t.double().square().sum() for t in rows.targets])
        before = self._error(rows, start, bias, affine, rectified)
        if not isfinite(before) or not isfinite(scale):
            return Refitted(layer.module, 0.0, 0.0, "as it is: its inputs or outputs are not finite")
        if before <= EXACT * scale:
            return Refitted(layer.module, before / max(scale, 1e-300), before / max(scale, 1e-300), "exact as it is")
        moments_wanted = self._output_moments(step, form, stays) if found.norm is not None else None
        weight, offset = self._solution(rows, start, affine, rectified, moments_wanted, can_shift(layer))
        after = self._error(rows, weight, offset, affine, rectified)
        note = ""
        if not after <= before:
            weight, offset, after = start, bias, before
            note = "as it is: no solution is better"
        else:
            self._write(layer, node, owner, form, weight, offset)
        return Refitted(layer.module, before / scale, after / scale, note)

    def _bias(self, node: fx.Node, layer: Layer, owner: nn.Module | None) -> Tensor | None:
        """The bias that is there: the layer's own, or one that absorbing gave it."""
        if "bias" in layer.params:
            return self.weights[layer.params["bias"]]
        given = getattr(owner, "bias", None) if owner is not None else operands(node, layer.op).get("bias")
        return at(self.merged, str(given.target)) if isinstance(given, fx.Node) else given

    def _present(self) -> set[str]:
        return set(self.run_of.merged.values) & set(self.run_of.original.values)

    def _affine(self, node: fx.Node, found: aims.Behind, outputs: Sequence[Tensor], stays: Tensor) -> aims.Affine:
        """What the BatchNorm behind a layer does to the channels that stay."""
        ones = torch.ones(len(stays), dtype=torch.float64, device=stays.device)
        if found.norm is None:
            shift = self.run_of.shifts.get(node.name)
            return aims.affine(ones, torch.zeros_like(ones) if shift is None else shift[stays])
        gain, constant = line(self.original, found.norm, *self.run_of.statistics(found.norm, outputs))
        return aims.affine(gain[stays], constant[stays])

    def _rows(
        self, step: Step, form: Form, index_of: Sequence[Tensor], inputs: Sequence[Tensor], found: aims.Behind,
        affine: aims.Affine, stays: Tensor,
    ) -> _Rows:  # fmt: skip
        """The output positions chosen of each batch."""
        sampled, wanted, others = [], [], []
        other = found.other
        for number, (x, y, index) in enumerate(zip(inputs, step.outputs, index_of, strict=True)):
            target = at_positions(y, form, index)[:, stays]
            now = None
            if other is not None:
                streams = self.run_of.original.values[other.name][number], self.run_of.merged.values[other.name][number]
                if streams[0].shape == y.shape:
                    before, now = at_positions(streams[0], form, index)[:, stays], at_positions(streams[1], form, index)
                    target = aims.residual(target, affine, before, now)
            sampled.append(patches(x, form, index))
            wanted.append(target)
            others.append(now)
        return _Rows(sampled, wanted, others)  # type: ignore[arg-type]

    def _output_moments(self, step: Step, form: Form, stays: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the original puts out: (o,), (o,)."""
        axis = step.outputs[0].dim() - form.spatial - 1
        mean, variance = moments(step.outputs, axis, self.settings.reduce)
        return mean[stays], variance[stays]

    def _solution(
        self,
        rows: _Rows,
        start: Tensor,
        affine: aims.Affine,
        rectified: bool,
        wanted: tuple[Tensor, Tensor] | None,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        """(W', b'): solved, alternated behind a rectifier, moments matched."""
        blocks = start.shape[:2]
        ridge, reduce = RIDGE, self.settings.reduce

        def shaped(targets: list[Tensor]) -> list[Tensor]:
            return [t.reshape(len(t), *blocks) for t in targets]

        normal = system(rows.patches, shaped(rows.targets), reduce, centred)
        weight = normal.solve(start, ridge)
        bias = normal.intercept(weight, normal.mean_t)
        last, pace = (weight, bias), 1.0
        for _ in range(ROUNDS if rectified else 0):
            # each round is a gradient step of a convex loss, in the Gram's metric: FISTA's momentum makes fewer do
            # (Beck & Teboulle, 2009, equations 4.1 to 4.3)
            here, faster = (weight, bias), (1 + (1 + 4 * pace**2) ** 0.5) / 2
            ahead, pace = (pace - 1) / faster, faster
            weight, bias = (now + ahead * (now - then) for now, then in zip(here, last, strict=True))
            last = here
            predicted = [_predict(p, weight, bias) for p in rows.patches]
            moved = [
                aims.rectified(t, y, affine, now)
                for t, y, now in zip(rows.targets, predicted, rows.others, strict=True)
            ]
            normal = normal.with_targets(rows.patches, shaped(moved), reduce)
            weight = normal.solve(weight, ridge)
            bias = normal.intercept(weight, normal.mean_t)
        if wanted is not None and centred:
            mean, variance = (t.view(blocks) for t in wanted)
            own = normal.variance(weight)
            factor = (variance / own.clamp(min=1e-300)).sqrt().clamp(1 / MATCH, MATCH)
            weight = weight * torch.where(own > 0, factor, 1)[:, :, None]
            bias = normal.intercept(weight, mean)
        return weight, bias

    def _error(self, rows: _Rows, weight: Tensor, bias: Tensor, affine: aims.Affine, rectified: bool) -> float:
        """Square error of a solution, over all rows and channels; behind a rectifier, of what passes it."""
        found = []
        for patch, target, now in zip(rows.patches, rows.targets, rows.others, strict=True):
            predicted = _predict(patch, weight, bias)
            if rectified:
                target = aims.rectified(target, predicted, affine, now)
            found.append((predicted - target).double().square().sum())
        return self._reduced(found)

    def _reduced(self, values: Sequence[Tensor]) -> float:
        return float(self.settings.reduce(torch.stack(list(values)).sum()))

    def _write(
        self, layer: Layer, node: fx.Node, owner: nn.Module | None, form: Form, weight: Tensor, bias: Tensor
    ) -> None:
        path = layer.params["weight"]
        old = self.weights[path]
        old.data.copy_(weight_of(weight, form, old))
        if "bias" in layer.params:
            self.weights[layer.params["bias"]].data.copy_(bias.flatten())
        elif can_shift(layer):
            prefix, _, name = path.rpartition(".")
            added = f"{prefix}.{'bias' if owner is not None else name + '_bias'}".lstrip(".")
            value = bias.flatten().to(old)
            if owner is not None and getattr(owner, "bias", None) is not None:
                self.weights[added].data.copy_(value)  # absorbing gave it one
                return
            self.weights.add(added, value, old.requires_grad)
            if owner is None:
                fetch_bias(node, added)


def can_shift(layer: Layer) -> bool:
    """May the layer have a bias? A matrix product has no place for one."""
    return layer.op != "matrix" or "bias" in layer.params


def _predict(patch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Outputs (rows, o) for patches (rows, g, p), in the patches' precision, float32 at least."""
    patch = patch if patch.dtype == torch.float64 else patch.float()
    out = torch.baddbmm(bias.to(patch)[:, None], patch.transpose(0, 1), weight.to(patch).mT)  # (g, rows, o)
    return out.transpose(0, 1).flatten(1)
