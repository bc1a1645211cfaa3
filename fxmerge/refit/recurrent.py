"""Refit of recurrent layers: LSTM, GRU and RNN, one layer and direction after the other.

A dropped unit is missing at every step, and what a step loses, later steps lose again. Both matrices of a layer are
solved on the states that the merged layer itself runs through, towards what the original's give at the same step, for
the units that stay (as in imitation learning: Ross, Gordon & Bagnell, 2011). The states change with the weights:
solves are repeated, and of all weights those stay with which the hidden states of samples held out are closest to the
original's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxmerge.calibration.epilogue import affine
from fxmerge.calibration.held_out import HELD_OUT, NO_FOLD
from fxmerge.calibration.paired_run import PairedRun, Settings
from fxmerge.calibration.patches import enough
from fxmerge.calibration.recurrent_states import Network, network_of, states_at
from fxmerge.calibration.stream import Stream
from fxmerge.ir.provenance import Layer
from fxmerge.refit.records import EXACTLY, NO_BETTER, TOO_FEW, Refitted
from fxmerge.refit.solve import Problem, Rows
from fxmerge.refit.targets import Target
from fxmerge.weights.by_path import at

ROUNDS = 4  # solves of a layer, each on the states that the one before leads to
UNKNOWN = "unchanged: its states are not known"


@dataclass(frozen=True)
class Recurrent:
    """Solves recurrent layers in one paired run."""

    paired: PairedRun
    settings: Settings
    exact: float

    def solve(self, node: fx.Node, layers: Sequence[Layer]) -> Refitted:
        """Solves the matrices of the module that a node calls, in place, where its hidden states come closer.

        layers: the module's, from both of its matrices in each layer and direction
        """
        name, network = layers[0].module, network_of(self.paired.merged.module, node)
        if network is None or not states_at(self.paired.original, node, 0):
            return Refitted(name, 0.0, 0.0, UNKNOWN)
        by_path = {layer.params["weight"]: layer for layer in layers}
        before, after = [], []
        for place in network.places:
            found = self._solve(node, network, place, by_path)
            if found is None:
                return Refitted(name, 0.0, 0.0, TOO_FEW)
            before.append(found[0])
            after.append(found[1])
        was, now = (sum(errors) / len(errors) for errors in (before, after))
        note = "" if now < was else EXACTLY if was <= self.exact else NO_BETTER
        return Refitted(name, was, now, note)

    def _solve(
        self, node: fx.Node, network: Network, place: str, layers: Mapping[str, Layer]
    ) -> tuple[float, float] | None:
        """The relative square error of a layer's hidden states before and after; None without samples held out."""
        first, second = (layers[network.paths[f"{kind}{place}"]] for kind in ("weight_ih", "weight_hh"))
        assert first.writes is not None and second.reads is not None
        stays, units = self.paired.kept(first.writes), self.paired.kept(second.reads.flatten())
        wanted = self._look(self.paired.original, node, place)
        wanted = [replace(one, held=one.held[..., units.to(one.held.device)]) for one in wanted]
        now = self._look(self.paired.merged, node, place)
        start = self._error(wanted, now)
        if start is None:
            return None
        both = _Matrices(self.paired.merged.module, network, place, ("weight_ih", "weight_hh"))
        least, best = start, [tensor.detach().clone() for tensor in both.tensors]
        # the first solve also sees the original's hidden states, as if the layer had lost nothing so far
        seen = [[replace(n, before=w.before[:, units.to(w.before.device)]) for w, n in zip(wanted, now, strict=True)]]
        # the reset gate of a GRU multiplies what only one of the matrices gives
        parts = [("weight_ih",), ("weight_hh",)] if network.mode == "GRU" else [both.kinds]
        for _ in range(ROUNDS if start > self.exact else 0):
            seen.append(now)
            for kinds in parts:
                here = replace(both, kinds=kinds)
                self._fit(replace(here, module=self.paired.original.module), here, wanted, seen, stays)
            now = self._look(self.paired.merged, node, place)
            error = self._error(wanted, now)
            if error is not None and error < least:
                least, best = error, [tensor.detach().clone() for tensor in both.tensors]
        for tensor, value in zip(both.tensors, best, strict=True):
            tensor.data.copy_(value)
        return start, least

    def _look(self, stream: Stream, node: fx.Node, place: str) -> list[_Seen]:
        """A sample of the states of one layer, by batch; the same steps of the same samples in each call."""
        generator, found, batches = torch.Generator().manual_seed(self.settings.seed), [], 0
        network = network_of(self.paired.merged.module, node)
        assert network is not None
        both = _Matrices(self.paired.original.module, network, place, ("weight_ih", "weight_hh"))
        for number, folds in enumerate(self.paired.folds):
            states = states_at(stream, node, number)[place]
            mine = states.hidden.new_tensor(float(len(stream.batches)), dtype=torch.float64)
            batches = batches or int(self.settings.reduce(mine))
            share = -(-enough(self.settings.rows, both.weight.size(1), self.settings.memory) // batches)
            index = torch.randperm(states.hidden.shape[:2].numel(), generator=generator)[:share].sort().values
            index = index.to(states.hidden.device)
            own = _of_sequences(folds, states.hidden.size(1)).to(index.device)
            held = (own == HELD_OUT).nonzero().flatten()
            found.append(
                _Seen(
                    inputs=states.inputs.flatten(0, 1)[index],
                    before=states.before.flatten(0, 1)[index],
                    held=states.hidden[:, held],
                    folds=own[index % len(own)],
                )
            )
        return found

    def _fit(
        self, there: _Matrices, here: _Matrices, wanted: Sequence[_Seen], seen: Sequence[Sequence[_Seen]], stays: Tensor
    ) -> None:
        """Solve matrices of the merged layer together, as one that reads what all of them read.

        seen: all that the layer has read so far, of which the solve is made; stays: the rows that the layer still has
        """
        unit, now = torch.ones(len(stays), dtype=torch.float64), stays.to(there.weight.device)
        wanted_by = [one.read(there.kinds) @ there.weight[now].T + there.bias[now] for one in wanted]
        targets = [Target(outputs=y, axis=1, affine=affine(unit, 0 * unit), bounds=None) for y in wanted_by]
        rows = Rows(
            [one.read(here.kinds)[:, None] for of_round in seen for one in of_round],
            targets * len(seen),
            [one.folds for of_round in seen for one in of_round],
        )
        start, bias = here.weight.double()[None], here.bias.double()[None]
        found = Problem(
            rows=rows, start=start, bias=bias, wanted=None, centred=here.biased, reduce=self.settings.reduce, rounds=0
        ).best()
        if found.after < found.before:
            here.write(found.weight[0], (found.bias - bias)[0])

    def _error(self, wanted: Sequence[_Seen], now: Sequence[_Seen]) -> float | None:
        """The relative square error of the hidden states of samples that are held out; None if there are none."""
        pairs = [(one.held.double(), other.held.double()) for one, other in zip(wanted, now, strict=True)]
        total = torch.stack([torch.stack([(b - a).square().sum(), a.square().sum()]) for a, b in pairs]).sum(0)
        missed, energy = self.settings.reduce(total).tolist()
        return missed / energy if energy else None


def _of_sequences(folds: Tensor, count: int) -> Tensor:
    """The folds of as many sequences as a layer reads, of samples with these folds; NO_FOLD where samples are not known
    to have equally many sequences each.
    """
    if not len(folds) or count % len(folds):
        return torch.full((count,), NO_FOLD)
    return folds.repeat_interleave(count // len(folds))


@dataclass(frozen=True)
class _Seen:
    """A sample of what a layer reads in one batch, (rows, channels), and the fold of each row; its hidden states in the
    samples that are held out, (t, samples, channels).
    """

    inputs: Tensor
    before: Tensor
    held: Tensor
    folds: Tensor

    def read(self, kinds: Sequence[str]) -> Tensor:
        """What these matrices read, side by side."""
        sources = {"weight_ih": self.inputs, "weight_hh": self.before}
        return torch.cat([sources[kind] for kind in kinds], 1)


@dataclass(frozen=True)
class _Matrices:
    """Matrices of one layer that are taken together, in one of the graph modules."""

    module: fx.GraphModule
    network: Network
    place: str
    kinds: tuple[str, ...]

    def _parameters(self, names: Sequence[str]) -> list[Tensor]:
        return [at(self.module, self.network.paths[f"{name}{self.place}"]) for name in names]

    @property
    def _weights(self) -> list[Tensor]:
        return self._parameters(self.kinds)

    @property
    def _biases(self) -> list[Tensor]:
        return self._parameters([kind.replace("weight", "bias") for kind in self.kinds] if self.biased else [])

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters themselves."""
        return [*self._weights, *self._biases]

    @property
    def biased(self) -> bool:
        return self.network.bias

    @property
    def weight(self) -> Tensor:
        """The matrices side by side, (o, p)."""
        return torch.cat([own.detach() for own in self._weights], 1)

    @property
    def bias(self) -> Tensor:
        """The sum of their biases, (o,)."""
        if not self.biased:
            return self.weight.new_zeros(len(self.weight))
        return torch.stack([bias.detach() for bias in self._biases]).sum(0)

    def write(self, weight: Tensor, change: Tensor) -> None:
        """Replace the weights, and change the first bias."""
        parts = torch.split(weight, [own.size(1) for own in self._weights], 1)
        for own, part in zip(self._weights, parts, strict=True):
            own.data.copy_(part)
        for bias in self._biases[:1]:
            bias.data.copy_(bias.detach() + change.to(bias))
