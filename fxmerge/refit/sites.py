"""Sites: a layer that a paired run has reached, with the rows and the targets that it is solved on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.calibration.decided import row_folds
from fxmerge.calibration.epilogue import Affine, Epilogue, affine, epilogue_of
from fxmerge.calibration.held_out import position_folds
from fxmerge.calibration.paired_run import PairedRun, Visit, line, moments
from fxmerge.calibration.patches import at_positions, channel_axis, input_of, patches, positions
from fxmerge.calibration.tail import Recomputed, shaped
from fxmerge.ir.provenance import Layer
from fxmerge.refit.layer_weights import LayerWeights
from fxmerge.refit.solve import Rows
from fxmerge.refit.targets import Target


@dataclass(frozen=True, kw_only=True)
class Site:
    """A layer that is being solved, and its epilogue."""

    visit: Visit
    layer: Layer
    held: LayerWeights
    epilogue: Epilogue
    affine: Affine
    stays: Tensor  # the indices of the original's output channels that the merged graph still has


class Sites:
    """Makes the sites of one paired run. norms: the BatchNorms by node."""

    def __init__(self, paired: PairedRun, norms: Mapping[str, Layer]) -> None:
        self.paired, self.norms = paired, dict(norms)

    def site(self, visit: Visit, layer: Layer, held: LayerWeights) -> Site:
        """The site of a layer that a paired run has reached."""
        found = epilogue_of(self.paired.merged.module, visit.node, self.norms, self._present())
        out_labels = layer.writes if layer.writes is not None else layer.carries
        assert out_labels is not None
        stays = self.paired.kept(out_labels).to(visit.outputs[0].device)
        step = self._affine(visit, found, stays)
        return Site(visit=visit, layer=layer, held=held, epilogue=found, affine=step, stays=stays)

    def _present(self) -> set[str]:
        """The nodes with values in both graphs; nodes that are not run (see `SampleRun`) have none."""
        both = self.paired.merged.values.keys() & self.paired.original.values.keys()
        held = self.paired.merged.values
        return {name for name in both if isinstance(held[name], Recomputed) or held[name][0] is not None}

    def _affine(self, visit: Visit, found: Epilogue, stays: Tensor) -> Affine:
        """The affine map of a layer's BatchNorm, or of the shift of its outputs, for the channels that stay."""
        ones = torch.ones(len(stays), dtype=torch.float64, device=stays.device)
        if found.norm is None:
            shift = self.paired.shifts.get(visit.node.name)
            return affine(ones, torch.zeros_like(ones) if shift is None else shift[stays])
        mean, deviation = self.paired.statistics(found.norm, visit.outputs)
        gain, constant = line(self.paired.original.module, found.norm, mean, deviation)
        return affine(gain[stays], constant[stays])

    def rows(self, site: Site, index_of: Sequence[Tensor]) -> Rows:
        """The patches and the targets at these output positions of each batch."""
        targets = [self.target(site, number, index) for number, index in enumerate(index_of)]
        return Rows(self.patches(site, index_of), targets, self.folds(site, index_of))

    def patches(self, site: Site, index_of: Sequence[Tensor]) -> list[Tensor]:
        """The patches of the merged graph at these output positions of each batch."""
        inputs = self.paired.merged.values[input_of(site.visit.node, site.layer.op).name]
        return [patches(x, site.held.form, index) for x, index in zip(inputs, index_of, strict=True)]

    def folds(self, site: Site, index_of: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The folds of these output positions, or of all: (positions,) by batch."""
        outputs, form = shaped(site.visit.outputs), site.held.form
        if index_of is None:
            index_of = [torch.arange(positions(y, form), device=y.device) for y in outputs]
        every = [positions(y, form) for y in outputs]
        if any(len(f) and count % len(f) for f, count in zip(self.paired.folds, every, strict=True)):
            rows = row_folds(self.paired, site.visit.node, every)
            if rows is not None:
                return [f[i.cpu()].to(i.device) for f, i in zip(rows, index_of, strict=True)]
        return position_folds(outputs, form, index_of, self.paired.folds)

    def target(self, site: Site, number: int, index: Tensor | None = None) -> Target:
        """The target of the layer's outputs for one batch, at these positions or everywhere."""
        outputs, form, other = site.visit.outputs[number], site.held.form, site.epilogue.other
        axis = 1 if index is not None else channel_axis(outputs, form)

        def chosen(values: Tensor) -> Tensor:
            return values if index is None else at_positions(values, form, index)

        streams = None
        if other is not None:
            before, now = (run.values[other.name][number] for run in (self.paired.original, self.paired.merged))
            if before.shape == outputs.shape:
                streams = chosen(before).index_select(axis, site.stays), chosen(now)
        return Target(
            outputs=chosen(outputs).index_select(axis, site.stays),
            axis=axis,
            affine=site.affine,
            bounds=site.epilogue.bounds,
            streams=streams,
        )

    def output_moments(self, site: Site) -> tuple[Tensor, Tensor]:
        """The mean and the variance of the original's outputs, of the channels that stay: (o,), (o,)."""
        outputs = self.paired.unpadded(site.visit.node.name, site.visit.outputs)
        mean, variance = moments(outputs, channel_axis(outputs[0], site.held.form), self.paired.reduce)
        return mean[site.stays], variance[site.stays]
