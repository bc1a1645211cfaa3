"""Write docs/language.md and language.svg from the rows of benchmarks.language: summary, plot and table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.page import escaped, pyplot, save_plot, short
from benchmarks.harness.rows import Row
from benchmarks.language.methods import DENSE, METHODS, WINDOWS
from benchmarks.language.pruning import RIDGE

Key = tuple[Any, ...]  # seed, network, removed share, method
Rows = Mapping[tuple[float, str], Row]  # (removed share, method) -> the row, of one network and seed

COMPARED = tuple(method for method in METHODS if method != DENSE)
VERSIONS = ("machine", "torch", "transformers")
MIB = 2**20

INTRODUCTION = f"""\
# Language models

`python -m benchmarks.language --nets DIR --out docs` writes this page. A share of the parameters of the decoder layers
is removed, without any training, and the perplexity is measured on {WINDOWS} windows of the test text. All methods get
the same tokens, which are from the validation text. Nothing is chosen on the test text.

- *wanda*: channels with the largest norm of the weight's column times norm of its input stay; nothing is re-solved (Sun
  et al., ICLR 2024, for structures as in An et al.). All layers lose the same share of their heads, rounded down, and
  the rest from their MLPs.
- *flap*: heads and channels of MLPs with the smallest fluctuation leave, all layers together, and their means go into
  biases (An et al., AAAI 2024).
- *second-order*: as many heads and channels as with *wanda* are eliminated, by their loss if all others are re-solved
  (Optimal Brain Surgeon for columns, as in ZipLM and SlimGPT); then each `o_proj` and `down_proj` that lost some is
  solved once, with a ridge of {RIDGE} times the mean of the diagonal.
- *slicegpt*: the residual stream is rotated to principal components and sliced (Ashkboos et al., ICLR 2024). The
  matrices in its adds are parameters of the layers. Its embedding and head are sliced too, but no longer tied, which
  the column *whole model* shows.
- *fxmerge*: a budget of the decoder layers' parameters and the calibration tokens; all else as by default.
- *fxmerge-no-data*: the same without the calibration tokens, with one window of them as the example input.

A head, for the first three, is a key-value head with the queries that read it.

*ratio*: perplexity over that of the dense model. *layers*, *whole model*: share of the parameters that is left in the
decoder layers and in all. *s*: CPU seconds of the method on one thread. *MiB*: its peak of memory in excess of the
loaded model.
"""


def page(rows: Rows, network: str, seed: int) -> str:
    """The page of one network and seed."""
    parts = [INTRODUCTION, *described(rows, network, seed), ""]
    if curves(rows):
        parts += ["![perplexity over that of the dense model, against the parameters removed](language.svg)", ""]
    parts += [*summary(rows), "", *table(rows), *failures(rows), ""]
    return "\n".join(parts)


def described(rows: Rows, network: str, seed: int) -> list[str]:
    """What was measured, on which machine and versions."""
    known: Row = {}
    for row in rows.values():
        known |= {name: row[name] for name in ("about", "tokens", "size") if row.get(name)}
    what = f"Network: {network}"
    if "size" in known:
        layers, whole = (size / 1e6 for size in known["size"])
        what += f", {layers:.1f} million parameters in the decoder layers, {whole:.1f} million in all"
    calibration = f" Calibration: {known['tokens']:,} tokens." if "tokens" in known else ""
    on = {name: " and ".join(sorted({row[name] for row in rows.values() if name in row})) for name in VERSIONS}
    libraries = [f"{name} {versions}" for name, versions in on.items() if name != "machine" and versions]
    conditions = ", ".join([f"One thread of {on['machine'] or 'no machine yet'}", *libraries, f"seed {seed}"])
    about = [known["about"], ""] if "about" in known else []
    return [*about, f"{what}.{calibration}", f"{conditions}."]


def shares(rows: Rows) -> list[float]:
    """The shares that were measured, in order."""
    return sorted({removed for removed, method in rows if method != DENSE})


def dense(rows: Rows) -> float | None:
    """The perplexity of the dense model, if it was measured."""
    return rows.get((0.0, DENSE), {}).get("perplexity")


def ratio(rows: Rows, removed: float, method: str) -> float | None:
    """Perplexity over that of the dense model, if both were measured."""
    perplexity, whole = rows.get((removed, method), {}).get("perplexity"), dense(rows)
    return None if perplexity is None or whole is None else perplexity / whole


def summary(rows: Rows) -> list[str]:
    """A line for each method; a cell is the perplexity, and its ratio to the dense model's."""
    columns, whole = shares(rows), dense(rows)
    lines = ["| method | " + " | ".join(f"{removed:.0%} removed" for removed in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for method in COMPARED:
        cells = [perplexity(rows.get((removed, method))) for removed in columns]
        if any(cells):
            ratios = [ratio(rows, removed, method) for removed in columns]
            told = [c if r is None else f"{c} ({r:.2f})" for c, r in zip(cells, ratios, strict=True)]
            lines.append(f"| {method} | " + " | ".join(told) + " |")
    return [f"Perplexity, and its ratio to the {whole:.2f} of the dense model:", "", *lines] if whole else lines


def table(rows: Rows) -> list[str]:
    """A line for each row, in the order in which they are measured."""
    lines = ["| removed | method | perplexity | ratio | layers | whole model | s | MiB |"]
    lines.append("|--:|---|--:|--:|--:|--:|--:|--:|")
    for removed, method in [(0.0, DENSE), *((share, method) for share in shares(rows) for method in COMPARED)]:
        row = rows.get((removed, method))
        if row is None:
            continue
        over = ratio(rows, removed, method)
        cells = [f"{removed:.0%}", method, perplexity(row), "" if over is None else f"{over:.2f}"]
        cells += [f"{row[name]:.1%}" if name in row else "" for name in ("parameters", "whole")]
        measured = "seconds" in row and method != DENSE
        cells += [f"{row['seconds']:,.0f}", f"{row['peak'] / MIB:,.0f}"] if measured else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def failures(rows: Rows) -> list[str]:
    """Why rows have no perplexity."""
    failed: dict[str, list[str]] = {}
    for (removed, method), row in rows.items():
        if "error" in row:
            failed.setdefault(row["error"], []).append(f"{method} {removed:.0%}")
    return [f"- {escaped(short(why, 300))}: {', '.join(which)}" for why, which in failed.items()]


def perplexity(row: Row | None) -> str:
    """The perplexity as text, or why there is none; empty without a row."""
    if row is None:
        return ""
    if "perplexity" not in row:
        return "out of time" if row.get("error", "").startswith("stopped") else "failed"
    value = row["perplexity"]
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    """The curve of each method: (parameters of the layers that were removed in %, ratio), fewest first."""
    found: dict[str, list[tuple[float, float]]] = {}
    for removed, method in sorted(rows):
        over = ratio(rows, removed, method)
        if over is not None and method != DENSE:
            found.setdefault(method, []).append((100 * (1 - rows[removed, method]["parameters"]), over))
    return found


def plot(rows: Rows, path: Path) -> None:
    """The ratio against the parameters removed, one line for each method. ImportError without matplotlib."""
    plt = pyplot()
    found = curves(rows)
    if not found:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in (m for m in COMPARED if m in found):
        style = {"linewidth": 2.4} if method.startswith("fxmerge") else {"linestyle": "--"}
        axis.plot(
            *zip((0, 1), *found[method], strict=True), marker="o", markersize=3, label=method,
            color=f"C{COMPARED.index(method)}", **style,
        )  # fmt: skip
    axis.set_yscale("log")
    axis.set(xlabel="parameters of the decoder layers removed, %", ylabel="perplexity, times that of the dense model")
    axis.legend(fontsize="small")
    save_plot(figure, path)
