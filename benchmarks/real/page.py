"""Write docs/real.md and real.svg from the rows of benchmarks.real: summary, plot, one table for each network."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.page import escaped, pyplot, save_plot, short
from benchmarks.harness.rows import Row
from benchmarks.real.methods import BUDGETS, METHODS, ORIGINAL, SAMPLES

Key = tuple[Any, ...]  # seed, network, budget, method
Rows = Mapping[tuple[str, str], Row]  # (budget, method) -> the row of one network

SUMMARY = ("ratio-0.1", "ratio-0.3", "flops-0.7-greedy")
COMPARED = tuple(method for method in METHODS if method != ORIGINAL)
STEEP = 10  # a plot has a logarithmic axis if the metric varies by a larger factor

INTRODUCTION = f"""\
# Accuracy on real networks

`python -m benchmarks.real --nets DIR --out docs` writes this page. The networks were trained by others, and their data
are real. Nothing is fine-tuned, and nothing is chosen on evaluation data: every option is the default or stated below,
and the same for all networks.

- *ratio*: share of the channels that every group drops. *of the FLOPs*: the budget of the whole model, allocated
  greedily or uniformly. All channels may be dropped (`scope="all"`).
- *prune*: `decomposition="prune"`, `selection="l2"`, `refit="none"`.
- *mostsim*: Neuron Merging as published, `decomposition="mostsim"`, `refit="none"`.
- *default*: fxmerge's defaults, without data other than the example inputs.
- *samples*: the defaults, with {SAMPLES} unlabelled samples as `calibration`, or as many as there are.
- *torch-pruning*: `MagnitudePruner` with `GroupMagnitudeImportance`. A budget is reached in small steps; *greedy* ranks
  the channels of all layers together. Layers that write the network's output are left alone.
- *parameters*, *FLOPs*: share of the original's that is left. *s*: CPU seconds of the merge on one thread.
"""


def page(rows: Mapping[Key, Row], seed: int) -> str:
    """The page of one seed."""
    found = by_network(rows, seed)
    parts = [INTRODUCTION, f"{conditions(row for of in found.values() for row in of.values())}, seed {seed}.", ""]
    if any(points(of) for of in found.values()):
        parts += ["![metric against FLOPs left](real.svg)", ""]
    parts += summary(found)
    for network, of in found.items():
        parts += section(network, of)
    return "\n".join(parts)


def by_network(rows: Mapping[Key, Row], seed: int) -> Mapping[str, Rows]:
    """The rows of one seed, by network."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for (row_seed, network, budget, method), row in sorted(rows.items()):
        if row_seed == seed:
            found.setdefault(network, {})[budget, method] = row
    return found


def conditions(rows: Iterable[Row]) -> str:
    """The machines and versions with which rows were measured."""
    rows = list(rows)
    machines, versions = (sorted({row[field] for row in rows if field in row}) for field in ("machine", "torch"))
    return "; ".join(["One thread of " + (" and ".join(machines) or "no machine yet"), "torch " + ", ".join(versions)])


def summary(found: Mapping[str, Rows]) -> list[str]:
    """A row for each network and budget; a cell is the metric."""
    lines = [f"| network | {ORIGINAL} | what is left | " + " | ".join(COMPARED) + " |"]
    lines.append("|---|--:|---|" + "--:|" * len(COMPARED))
    for network, of in found.items():
        for budget in SUMMARY:
            cells = [metric(of.get((budget, method))) for method in COMPARED]
            if any(cells):
                first = [network, metric(of.get(("", ORIGINAL))), BUDGETS[budget].title]
                lines.append("| " + " | ".join([*first, *cells]) + " |")
    return [*lines, ""]


def section(network: str, of: Rows) -> list[str]:
    """The table of one network, and what failed."""
    known: Row = {}
    for measured in of.values():
        known |= {field: measured[field] for field in ("about", "evaluated_on", "samples") if measured.get(field)}
    about = [known["about"], ""] if "about" in known else []
    evaluation = f"Evaluation: {known['evaluated_on']}. " if "evaluated_on" in known else ""
    calibration = f"Calibration: {known['samples']} samples. " if "samples" in known else ""
    lines = [f"## {network}", "", *about]
    lines += [f"{evaluation}{calibration}".strip(), ""] if evaluation or calibration else []
    lines += ["| budget | method | metric | parameters | FLOPs | s |", "|---|---|--:|--:|--:|--:|"]
    failed: dict[str, list[str]] = {}
    for budget, method, title in order():
        row = of.get((budget, method))
        if row is None:
            continue
        left = [f"{row[field]:.1%}" if field in row else "" for field in ("parameters", "flops")]
        seconds = f"{row['seconds']:.2f}" if "seconds" in row and method != ORIGINAL else ""
        lines.append("| " + " | ".join([title, method, metric(row), *left, seconds]) + " |")
        if "error" in row:
            failed.setdefault(row["error"], []).append(f"{title} {method}".strip())
    lines.append("")
    if failed:
        lines += [f"- {escaped(short(why, 300))}: {', '.join(which)}" for why, which in failed.items()]
        lines.append("")
    return lines


def order() -> Iterable[tuple[str, str, str]]:
    """(budget, method, title) of each row of a table."""
    yield "", ORIGINAL, ""
    for budget, described in sorted(BUDGETS.items(), key=lambda item: item[0].split("-")[0] != "ratio"):
        for method in COMPARED:
            yield budget, method, described.title


def metric(row: Row | None) -> str:
    """The metric as text, or why there is none; empty without a row."""
    if row is None:
        return ""
    if "metric" not in row:
        return "out of time" if row.get("error", "").startswith("stopped") else "failed"
    return f"{row['metric']:.1f}" if abs(row["metric"]) < 1e5 else f"{row['metric']:.1e}"


def points(of: Rows) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The curves of one network: (method, allocation) -> (FLOPs left in %, metric), most FLOPs first.

    Every group drops the same share of its channels at a ratio, as in a uniform allocation.
    """
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (budget, method), row in of.items():
        if method != ORIGINAL and "metric" in row:
            allocation = BUDGETS[budget].options.get("allocation", "uniform")
            curves.setdefault((method, allocation), []).append((100 * row["flops"], row["metric"]))
    return {key: sorted(curve, reverse=True) for key, curve in curves.items()}


def plot(rows: Mapping[Key, Row], seed: int, path: Path) -> None:
    """The metric against the FLOPs left, with one panel for each network. ImportError without matplotlib."""
    plt = pyplot()
    found = {network: of for network, of in by_network(rows, seed).items() if points(of)}
    if not found:
        return
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, (network, of) in zip(axes.flat, found.items(), strict=False):
        curves = points(of)
        for (method, allocation), curve in curves.items():
            (drawn,) = axis.plot(
                *zip(*curve, strict=True), marker="o", markersize=3, color=f"C{COMPARED.index(method)}",
                linestyle="--" if allocation == "greedy" else "-",
            )  # fmt: skip
            handles[f"{method}, {allocation}"] = drawn
        original = of.get(("", ORIGINAL), {}).get("metric")
        if original is not None:
            axis.axhline(original, color="grey", linestyle=":")
        values = [value for curve in curves.values() for _, value in curve]
        if min(values) > 0 and max(values) > STEEP * (original or max(values)):
            axis.set_yscale("log")
        axis.set(title=network, xlabel="FLOPs left, %", ylabel="metric")
    for axis in list(axes.flat)[len(found) :]:
        axis.set_axis_off()
    names = sorted(handles, key=lambda name: (COMPARED.index(name.partition(",")[0]), name))
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=4, fontsize="small")
    save_plot(figure, path)
