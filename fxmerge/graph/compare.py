"""Compares the outputs of two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.eval_mode import evaluating, random_states, reproducible
from fxmerge.graph.inputs import other_values
from fxmerge.graph.nested import fresh, leaves
from fxmerge.graph.outputs import counting, returned

REPEATED = 1e-4  # the relative difference of two runs of one model by rounding, at most
SMALLEST = 1e-8  # of the norm of all outputs: up to here, one output has no norm of its own
PIECE = 2**20  # elements that are compared at a time: the scores of a large vocabulary take as much as a model
VARIED = 4  # runs of the original on other values, to find the lengths of outputs that depend on them
_REMEDY = "please report this model; until then, exclude the layer with ignore="


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a merged model with the original on the example inputs.

    error:    |merged - original| / |original|, the largest of all real and complex output tensors; for a model that
              returns integers only, `differing`. NaN where it cannot be measured
    reason:   why it cannot be measured or is not finite, or ""
    differing:  the share of the entries of integer and boolean outputs that differ; None without such outputs
    """

    error: float
    reason: str = ""
    differing: float | None = None

    def text(self) -> str:
        """The error in words: `0.031`, or `not measurable (...)`."""
        found = f"{self.error:.3g}" if self.error == self.error else "not measurable"
        found += f" ({self.reason})" if self.reason else ""
        if self.differing is None:
            return found
        return f"{found}; share of the integer outputs' entries that differ: {self.differing:.3g}"


@dataclass(frozen=True)
class Run:
    """One run of a model: the tensors that it returned, and the random number generators after it.

    drawn: whether it took numbers from torch's generators
    """

    outputs: list[Tensor]  # real and complex
    integers: list[Tensor]  # and booleans
    states: list[Tensor]
    drawn: bool


def run(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Run:
    """Runs a model in evaluation mode from a fixed seed. Training flags are restored."""
    with evaluating(module), torch.no_grad(), reproducible():
        before = random_states()
        value = module(*fresh(list(args)), **fresh(dict(kwargs or {})))
        after = random_states()
    drawn = len(before) != len(after) or any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return Run(returned(value), counting(value), after, drawn)


def outputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The real and complex tensors that a model returns in evaluation mode, in order. Training flags are restored."""
    return run(module, args, kwargs).outputs


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest |one - other| / |one| of all tensors; infinite where shapes differ or values are not finite.

    Each tensor has a norm of its own, so that large ones do not hide others. What is smaller than SMALLEST beside all
    together, zeros and what rounding left of them, is measured by the norm of all.
    """
    if [t.shape for t in one] != [t.shape for t in other]:
        return inf
    sizes = [sum(squared(a) for (a,) in in_pieces(value)) for value in one]
    whole = max(sum(sizes), 1e-300)
    apart = [sum(squared(a - b) for a, b in in_pieces(*pair)) for pair in zip(one, other, strict=True)]
    norms = [size if size > whole * SMALLEST**2 else whole for size in sizes]
    found = [(a / norm) ** 0.5 for a, norm in zip(apart, norms, strict=True)]
    return max(found, default=0.0) if all(e == e for e in found) else inf


def measured(before: Sequence[Tensor], after: Sequence[Tensor]) -> Verdict:
    """The relative error of some outputs, which have the shapes of the original's.

    Entries that are not finite and the same in both, such as those of a mask, are left out.
    """
    if not before:
        return Verdict(nan, "the model returns no tensors of numbers")
    if not any(t.numel() for t in before):
        return Verdict(nan, "the original's outputs have no elements on the example inputs")
    kept = []
    for one, other in zip(before, after, strict=True):
        sound = torch.isfinite(one)
        if bool(sound.all()):
            kept.append((one, other))
            continue
        same = (one == other) | (torch.isnan(one) & torch.isnan(other))
        if not bool((sound | same).all()):
            return Verdict(nan, "the original's outputs are not finite on the example inputs")
        kept.append((one[sound], other[sound]))
    if not any(one.numel() for one, _ in kept):
        return Verdict(nan, "the original's outputs are not finite on the example inputs")
    if not any(bool(one.any()) for one, _ in kept):
        return Verdict(nan, "the original's outputs are all zeros on the example inputs")
    if not all(bool(torch.isfinite(other).all()) for _, other in kept):
        return Verdict(inf, "the merged model's outputs are not finite")
    return Verdict(difference([one for one, _ in kept], [other for _, other in kept]))


def judged(
    original: nn.Module,
    merged: nn.Module,
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    *,
    expected: Sequence[Tensor],
    unsure: bool,
    lengths_vary: bool,
) -> Verdict:
    """The merged model's outputs on (args, kwargs), compared with the original's.

    expected:      the original's real and complex outputs, from a run with the same seed
    unsure:        whether the original may take random numbers that torch's own generators do not show
    lengths_vary:  whether the length of the outputs' first axis may depend on values

    The original is run once more where outputs are integers, or may be random, or where shapes differ. Raises
    FxMergeError where the merged model does not run, or where its outputs have other shapes and these do not depend on
    values; else only those of equal shapes are compared.
    """
    try:
        found = run(merged, *inputs)
    except Exception as error:
        raise FxMergeError(f"the merged model does not run ({error}); {_REMEDY}") from error
    random = unsure or found.drawn
    again = run(original, *inputs) if random or found.integers else None
    before, after = list(expected), found.outputs
    if [t.shape for t in before] != [t.shape for t in after]:
        if not _only_lengths(before, after, lengths_vary, original, inputs):
            raise FxMergeError(f"the merged model's outputs have other shapes than the original's; {_REMEDY}")
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.shape == a.shape]
        if not pairs:
            return Verdict(nan, "the merged model's outputs have other lengths than the original's")
        before, after = [b for b, _ in pairs], [a for _, a in pairs]
    if again is None:
        return measured(before, after)
    if random and (why := _random(expected, found, again)):
        return Verdict(nan, why)
    share = _differing(again.integers, found.integers)
    if not before and share is not None:
        return Verdict(share, differing=share)
    return replace(measured(before, after), differing=share)


def _only_lengths(
    before: Sequence[Tensor], after: Sequence[Tensor], first: bool, original: nn.Module, inputs: tuple[Any, Any]
) -> bool:
    """Whether outputs differ in lengths that depend on values, as the number of boxes, or the length of what is spoken.

    first: whether those of the first axis may; others do if the original's change with values of the inputs
    """
    if [t.dim() for t in before] != [t.dim() for t in after]:
        return False
    if first and all(b.shape[1:] == a.shape[1:] for b, a in zip(before, after, strict=True)):
        return True
    sizes, found = ([n for t in some for n in t.shape] for some in (before, after))
    fixed = {at for at, (own, other) in enumerate(zip(sizes, found, strict=True)) if own != other}
    for _ in range(VARIED):
        inputs = other_values(inputs)
        others = [n for t in run(original, *inputs).outputs for n in t.shape]
        if len(others) == len(sizes):
            fixed = {at for at in fixed if others[at] == sizes[at]}
    return not fixed


def has_generators(module: fx.GraphModule) -> bool:
    """Whether a call of the graph is given a random number generator of the model's own."""
    nodes = module.graph.nodes
    held = [getattr(module, str(n.target), None) for n in nodes if n.op == "get_attr"]
    given = [leaf for n in nodes for leaf in leaves([n.args, n.kwargs])]
    return any(isinstance(leaf, torch.Generator) for leaf in (*held, *given))


def _random(expected: Sequence[Tensor], merged: Run, original: Run) -> str:
    """Why two models cannot be compared if they depend on random numbers, or ""."""
    pairs = list(zip(expected, original.outputs, strict=False))
    if len(pairs) < len(expected) or not all(a.shape == b.shape and _repeated(a, b) for a, b in pairs):
        return "the original's outputs are random: two runs on the same inputs differ"
    if merged.drawn and not all(torch.equal(a, b) for a, b in zip(merged.states, original.states, strict=False)):
        return "the outputs are random, and the merged model draws other numbers than the original"
    return ""


def _repeated(one: Tensor, other: Tensor) -> bool:
    """Whether two runs of a model gave the same, but for rounding."""
    sound = torch.isfinite(one) & torch.isfinite(other)
    return bool((torch.isfinite(one) == sound).all()) and difference([one[sound]], [other[sound]]) <= REPEATED


def _differing(one: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """The share of entries that differ, of the tensors of equal shape; None if these have no entries."""
    pairs = [(a, b) for a, b in zip(one, other, strict=False) if a.shape == b.shape and a.numel()]
    if not pairs:
        return None
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def in_pieces(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, PIECE of their elements at a time, in double precision."""
    flat = [value.detach().reshape(-1) for value in values]
    for some in zip(*(torch.split(value, PIECE) for value in flat), strict=True):
        yield tuple(value.to(torch.complex128 if value.is_complex() else torch.float64) for value in some)


def squared(values: Tensor) -> float:
    """The sum of the squares of absolute values."""
    return float(values.abs().square().sum())
