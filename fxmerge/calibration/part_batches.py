"""The batches that refit runs on for a model that is captured in parts: runs of the user's own code on samples.

The samples are the user's calibration data or the example inputs, and variants of these. Each is run alone, so that
whole samples can be held out; where the model's code does not run on single samples, batches are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fxmerge.calibration.batches import ELEMENTS, FORWARD, SMALL, Fed, UnprobedError
from fxmerge.calibration.batches import MOST as SAMPLES
from fxmerge.calibration.held_out import FOLDS, HELD_OUT, sample_folds
from fxmerge.calibration.live import samples_within
from fxmerge.calibration.nested_data import Sample, example_of, given_batch, grouped, varied
from fxmerge.calibration.part_inputs import Declined, OwnCode
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.calibration.user_data import NO_BATCHES, iterable
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import call_cost
from fxmerge.graph.distributed import rank_and_size
from fxmerge.graph.nested import leaves
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.probe_statistics import looks_real, placed
from fxmerge.methods.probe_variants import augmented
from fxmerge.methods.probes import EXAMPLE, OF_EXAMPLE, PROBES
from fxmerge.options import Options
from fxmerge.progress import Stage

LEAST, MOST = 2 * FOLDS, 64  # runs of the user's code; LEAST are enough to hold some out


def fed_in_parts(
    captured: Capture, facts: Provenance, options: Options, given: Any, stage: Stage
) -> tuple[Fed, tuple[str, ...]]:
    """This process's share of the runs, and notes on them for the report.

    Raises FxMergeError where the user's batches do not fit the model, UnprobedError where refit has nothing to run on.
    """
    runs = _Runs(captured, facts, options, stage)
    return runs.of_data(given) if given is not None else runs.of_example()


class _Runs:
    def __init__(self, captured: Capture, facts: Provenance, options: Options, stage: Stage) -> None:
        self.captured, self.options, self.stage = captured, options, stage
        self.own, (self.rank, self.size) = OwnCode(captured, facts), rank_and_size()
        self.example = example_of(captured)
        self.tried, self.declined = 0, list[Declined]()
        if not self.own.ends:
            raise UnprobedError("refit is left out, as no part returns anything that the rest of the code reads")

    def of_data(self, given: Any) -> tuple[Fed, tuple[str, ...]]:
        """Runs on the user's samples, and on variants of those that are not held out."""
        batches = self._read(iterable(given))
        if not batches:
            raise FxMergeError(NO_BATCHES)
        samples = self._divided(batches)[self.rank :: self.size]
        mine = self._run(samples)
        failed = next((d.reason for d in self.declined if d.failed), "")
        if not mine and failed:
            raise FxMergeError(f"the model {failed} on a calibration batch; give inputs as its forward takes them")
        self._check(mine)
        folds = torch.cat(sample_folds([1] * len(mine)))
        sources = [sample for (sample, _), fold in zip(mine, folds.tolist(), strict=True) if fold != HELD_OUT]
        missing = max(0, (self.limit // self.size - sum(s.count for s, _ in mine)) // mine[0][0].count)
        each = -(-missing // len(sources))
        made: list[list[Sample]] = []
        for number, sample in enumerate(sources):
            generator = torch.Generator().manual_seed(self.options.seed + self.rank + self.size * number)
            made.append(varied(sample, each, lambda x, count: augmented(x, count * len(x), generator)))  # noqa: B023
        more = self._run([sample for row in zip(*made, strict=True) for sample in row][:missing]) if all(made) else []
        text = f"{sum(s.count for s, _ in mine):,} calibration samples"
        text += f" and {sum(s.count for s, _ in more):,} variants of them" if more else ""
        return self._fed(mine + more, len(mine), True, text)

    def of_example(self) -> tuple[Fed, tuple[str, ...]]:
        """Runs on the example's samples and on variants of them; on noise like them if they are noise."""
        family = self.options.probes
        values = [v for v in leaves([self.example.args, dict(self.example.kwargs)]) if isinstance(v, Tensor)]
        floats = [v for v in values if v.is_floating_point() and v.dim() >= 2]
        real = bool(floats) and all(looks_real(v[None] if v.dim() == 3 else v) for v in floats)
        if family == "auto":
            family = EXAMPLE if real else next(iter(PROBES))
        samples = self._divided([self.example])
        made: list[list[Sample]] = []
        for number, sample in enumerate(samples):
            generator = torch.Generator().manual_seed(self.options.seed + number)

            def vary(x: Tensor, count: int) -> Tensor:
                drawn = PROBES[family](x, count * len(x), generator)  # noqa: B023
                return drawn if family in OF_EXAMPLE else placed(x, drawn)

            each = -(-self.limit // sum(s.count for s in samples))
            made.append(varied(sample, each, vary) or [sample])
        rows = [sample for row in zip(*made, strict=True) for sample in row]
        if self._each > samples[0].count:
            rows = self._grouped(rows, self._each) or rows
        found = self._run(rows[self.rank :: self.size])
        self._check(found)
        real = real and family in OF_EXAMPLE
        of = "made from the example inputs" if real else family if len(rows) > len(samples) else "the example inputs"
        return self._fed(found, 0, real, f"{sum(s.count for s, _ in found):,} probes ({of})")

    @cached_property
    def limit(self) -> int:
        """The number of samples on all processes: more where activations are small, fewer where runs are expensive."""
        captured, count = self.captured, self.example.count
        largest = max((int(torch.Size(s).numel()) for s in captured.shapes.values()), default=1) / count
        host = self.own.recorded.host
        each = call_cost(host, captured.args, captured.kwargs, captured.module, captured.inputs).flops / count
        many = max(MOST, min(SAMPLES, int(SMALL / largest)))
        wanted = self.options.samples or max(LEAST, min(many, int(FORWARD / max(each, 1))))
        if self.options.memory:
            wanted = min(wanted, samples_within(captured, count, self.options.memory))
        return max(self.size, min(wanted, int(ELEMENTS / largest)))

    @property
    def _each(self) -> int:
        """The number of samples in a run."""
        return -(-self.limit // max(MOST, self.size))

    def _read(self, given: Iterable[Any]) -> list[Sample]:
        """The user's batches until they hold `limit` samples."""
        found: list[Sample] = []
        for batch in given:
            found.append(given_batch(self.captured, batch))
            if sum(sample.count for sample in found) >= self.limit:
                break
        return found

    def _divided(self, batches: Sequence[Sample]) -> list[Sample]:
        """The samples, a few at a time, or as many as in the example; the batches if the code needs them whole."""
        total = sum(batch.count for batch in batches)
        few = max(1, min(self._each, total // LEAST))
        return self._grouped(batches, few) or self._grouped(batches, self.example.count) or list(batches)

    def _grouped(self, batches: Sequence[Sample], size: int) -> list[Sample]:
        """The samples, `size` at a time; none if the model's code does not run on these in the same way."""
        try:
            found = grouped(batches, size)
        except RuntimeError:  # of different shapes
            return []
        runs = found and isinstance(self.own.run(found[0].args, found[0].kwargs), SampleRun)
        return found if runs else []

    def _run(self, samples: Sequence[Sample]) -> list[tuple[Sample, SampleRun]]:
        """The samples with what reached the parts; those on which that is not known are left out."""
        found = []
        for number, sample in enumerate(samples):
            self.stage(f"run {number + 1} of {len(samples)} of the model's code", number / len(samples))
            run = self.own.run(sample.args, sample.kwargs)
            self.tried += 1
            if isinstance(run, Declined):
                self.declined.append(run)
            else:
                found.append((sample, run))
        return found

    def _check(self, found: Sequence[object]) -> None:
        if not found:
            reasons = ", or ".join(dict.fromkeys(d.reason for d in self.declined))
            raise UnprobedError(
                f"refit is left out, as on each of {self.tried} samples the model {reasons}; "
                "give merge(..., calibration=batches) like the example inputs"
            )

    def _fed(
        self, found: Sequence[tuple[Sample, SampleRun]], made: int, real: bool, text: str
    ) -> tuple[Fed, tuple[str, ...]]:
        notes = []
        if self.declined:
            reasons = ", or ".join(dict.fromkeys(d.reason for d in self.declined))
            notes.append(f"refit leaves out {len(self.declined)} of {self.tried} samples, on which the model {reasons}")
        if follows := self.own.follows:
            notes.append(
                f"{', '.join(follows)}: refit feeds both models what the original's own code makes of the other parts, "
                "since this code may decide differently in the merged model"
            )
        source = f"{text}, by the model's own code"
        return Fed(batches=[run for _, run in found], made=made, real=real, source=source), tuple(notes)
