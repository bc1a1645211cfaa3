"""Measure one row of benchmarks.coverage. This runs in its own process.

Seconds are CPU seconds on one thread, which depend less on the load of the machine than wall-clock time.
"""

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

import fxmerge
from benchmarks.coverage.zoo import Specimen, build
from benchmarks.harness.process import Finding, caught
from benchmarks.peers import torch_pruning as peer
from fxmerge import verify
from fxmerge.graph import compare

RATIO = 0.5
ORACLE_PARAMETERS = 400_000_000  # there is not enough memory for float64 copies of larger models


def count(module: nn.Module) -> int:
    """Number of elements of all parameters; shared parameters count once."""
    return sum(p.numel() for p in module.parameters())


def shapes(value: Any) -> list[list[int]]:
    """The shapes of the tensors in the output of a model, which may be nested."""
    if isinstance(value, Tensor):
        return [list(value.shape)]
    if isinstance(value, dict):
        value = list(value.values())
    return [s for v in value for s in shapes(v)] if isinstance(value, list | tuple) else []


def fxmerge_findings(specimen: Specimen, oracle_seconds: float) -> Iterator[Finding]:
    """Analyse and merge one model, then run oracles 1 and 6."""
    before = shapes(specimen.run())
    yield {"stage": "analysis"}
    start = time.process_time()
    analysis = fxmerge.analyze(specimen.model, specimen.inputs)
    seconds = time.process_time() - start
    refused = Counter[str]()
    for refusal in analysis.refusals:
        refused[refusal.reason] += refusal.channels
    yield {
        "analysis_s": seconds,
        "route": analysis.captured.route,
        "groups": len(analysis.groups),
        "channels": sum(g.channels for g in analysis.groups),
        "refused": refused.most_common(3),
        "stage": "merge",
    }
    start = time.process_time()
    result = fxmerge.merge(
        specimen.model, specimen.inputs, ratio=RATIO, decomposition="prune", scope="all", refit="none"
    )
    seconds = time.process_time() - start
    whole = count(specimen.model)
    unused = 0
    if isinstance(result.module, fx.GraphModule):  # it has only the layers that it calls
        unused = max(whole - count(result.analysis.captured.module), 0)
    after = Specimen(result.module.eval(), specimen.inputs)
    yield {
        "merge_s": seconds,
        "left": (count(result.module) + unused) / whole,
        "shapes_kept": shapes(after.run()) == before,
        "change": result.report.verdict.error,
        "status": "ok",
        "stage": "oracle",
    }
    plan = result.plan
    del result, after
    gc.collect()
    yield from oracle_findings(analysis, whole, oracle_seconds)
    gc.collect()
    yield {"stage": "silence"}
    yield from silence_findings(analysis, plan, whole, oracle_seconds)


def oracle_findings(analysis: fxmerge.Analysis, parameters: int, seconds: float) -> Iterator[Finding]:
    """Oracle 1: permute all groups together, then as many single groups as `seconds` allow, spread over the model."""
    if parameters > ORACLE_PARAMETERS:
        yield {"oracle_note": "too large"}
        return
    if not analysis.groups:
        yield {"oracle_note": "no groups"}
        return
    captured, facts, grouping = analysis.captured, analysis.facts, analysis.grouping
    start = time.process_time()
    module, args, kwargs = verify.in_float64(captured)
    before = compare.outputs(verify.whole(captured, module), args, kwargs)
    permuted = module
    for group in grouping.groups:
        permuted = verify.permute(permuted, facts, grouping, group)
    together = compare.difference(before, compare.outputs(verify.whole(captured, permuted), args, kwargs))
    del module, permuted, before
    gc.collect()
    spent = time.process_time() - start
    yield {"oracle": together, "oracle_tried": 0, "oracle_note": ""}
    groups = grouping.groups
    tried = min(len(groups), int(2 * (seconds - spent) / max(spent, 1e-3)))  # `spent` covers two runs of the model
    if tried > 0:
        some = tuple(groups[i * len(groups) // tried] for i in range(tried))
        found = verify.permutation(captured, facts, replace(grouping, groups=some))
        worst = max(found, key=lambda name: found[name])
        yield {"oracle": max(together, found[worst]), "oracle_worst": worst, "oracle_tried": tried}


def silence_findings(
    analysis: fxmerge.Analysis, plan: fxmerge.Plan, parameters: int, seconds: float
) -> Iterator[Finding]:
    """Oracle 6: all groups together on other values, then on other sizes, then single groups, as `seconds` allow."""
    if parameters > ORACLE_PARAMETERS:
        yield {"silence_note": "too large"}
        return
    captured, facts, grouping = analysis.captured, analysis.facts, analysis.grouping
    values, *sizes = verify.unseen(captured.args, captured.kwargs)
    start = time.process_time()

    def errors(inputs: Sequence[verify.Unseen], groups: tuple[Any, ...] = plan.groups) -> verify.Silence:
        some = replace(plan, groups=groups)
        return verify.silence(captured, facts, grouping, some, each=False, inputs=inputs)

    def left() -> float:
        return seconds - (time.process_time() - start)

    found = errors([values])
    once = seconds - left()
    worst = found.errors.get("all")
    checked = len(plan.groups) - len(found.left_out)
    yield {
        "silence": worst, "silence_groups": checked, "silence_left_out": len(found.left_out),
        "silence_on_graph": len(found.on_graph), "silence_inputs": list(found.inputs),
        "silence_note": "" if worst is not None else "; ".join(dict.fromkeys(found.left_out.values()))[:200],
    }  # fmt: skip
    inputs, refused = list(found.inputs), dict(found.refused)
    for other in sizes:
        if left() < 2 * once:
            break
        on_size = errors([other])
        refused |= on_size.refused
        if "all" in on_size.errors:
            worst = max(worst or 0.0, on_size.errors["all"])
            inputs += on_size.inputs or [f"{other.name}, which the merged model does not take"]
            yield {"silence": worst, "silence_inputs": inputs}
    yield {"silence_refused": {name: why[:120] for name, why in refused.items()}, "silence_tried": 0}
    single = [p for p in plan.groups if p.name not in found.left_out]
    tried = min(len(single), int(left() / max(once, 1e-3)))
    for number in range(max(tried, 0)):
        group = single[number * len(single) // tried]
        alone = errors([values], (group,)).errors.get("all", 0.0)
        if alone > (worst or 0.0):
            worst = alone
            yield {"silence": worst, "silence_worst": group.name}
        yield {"silence_tried": number + 1}


def peer_findings(specimen: Specimen, suite: str) -> Iterator[Finding]:
    """Prune the model with the peer."""
    before, whole = shapes(specimen.run()), count(specimen.model)
    yield {"stage": "prune"}
    start = time.process_time()
    peer.prune(specimen, suite, RATIO)
    seconds = time.process_time() - start
    yield {"stage": "run"}
    after = shapes(specimen.run())
    left = count(specimen.model) / whole
    yield {"merge_s": seconds, "left": left, "shapes_kept": after == before, "status": "ok"}


def findings(tool: str, suite: str, name: str, oracle_seconds: float) -> Iterator[Finding]:
    """All findings on one model. If it fails, the last one has the error."""
    return caught(_findings(tool, suite, name, oracle_seconds))


def _findings(tool: str, suite: str, name: str, oracle_seconds: float) -> Iterator[Finding]:
    yield {"status": "failed", "stage": "build"}
    specimen = build(suite, name)
    yield {"parameters": count(specimen.model)}
    if tool == "peer":
        yield from peer_findings(specimen, suite)
    else:
        yield from fxmerge_findings(specimen, oracle_seconds)
    yield {"stage": "done"}
