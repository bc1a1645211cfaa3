"""Write docs/recovery.md and recovery.svg from the rows of benchmarks.recover: a table and a plot for each network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.page import escaped, pyplot, save_plot, short
from benchmarks.harness.rows import Row
from benchmarks.networks.published import NETWORKS as TITLES
from benchmarks.recover.methods import METHODS, NETWORKS, ORIGINAL, SAMPLES
from benchmarks.recover.training import BATCH, LR, MOMENTUM, OWN_LR, SHORT, SHORT_LR, WEIGHT_DECAY

Key = tuple[Any, ...]  # seed, network, method, epochs
Rows = Mapping[tuple[str, str, int], Row]  # (network, method, epochs) -> the row, of one seed

COMPARED = tuple(method for method in METHODS if method != ORIGINAL)

INTRODUCTION = f"""\
# Recovery by fine-tuning

`python -m benchmarks.recover --data DIR --weights DIR --out docs` writes this page. Trained networks are narrowed to a
share of their FLOPs and fine-tuned: SGD with Nesterov momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, batches of
{BATCH}, a learning rate that falls from {LR} to zero by half a cosine, images cropped and mirrored at random. Every
cell is a training of its own over that many epochs. The test images are used once for each cell; nothing is chosen on
them.

- *l1*: all groups drop the same share of their channels, those with the smallest l1 norm (Li et al., ICLR 2017).
- *reprune-2020*: the same widths; the filters are elected by clustering (REPrune, 2020).
- *reprune-2024*: kernels are clustered and channels masked while the network is trained, over the first half of the
  epochs; masked channels may grow back (`fxmerge.Shrinker`; REPrune, Park et al., AAAI 2024).
- *merged*: `fxmerge.merge` with `refit="none"`, widths by greedy allocation.
- *refit*: `fxmerge.merge` with {SAMPLES} unlabelled training images as `calibration`.
- *distilled*: the same, trained with `fxmerge.distill` on means of two images, without labels (`mix=True`, `hidden=0`).
  For {SHORT} epochs and more, with `batch_statistics=True` and a learning rate of {OWN_LR} times the epochs, at most
  {LR}; for fewer, by AdamW with {SHORT_LR} times the square root of the epochs. All others are trained with the labels
  alone.
"""


def page(rows: Rows, seed: int) -> str:
    """The page of one seed."""
    parts = [INTRODUCTION, f"{conditions(rows)}, seed {seed}.", ""]
    if any("accuracy" in row for row in rows.values()):
        parts += ["![error against epochs](recovery.svg)", ""]
    for network in (n for n in NETWORKS if any(key[0] == n for key in rows)):
        parts += section(network, rows)
    return "\n".join(parts)


def conditions(rows: Rows) -> str:
    """The machines, versions and precisions with which rows were measured."""
    found = {n: " and ".join(sorted({str(r[n]) for r in rows.values() if n in r})) for n in ("machine", "torch")}
    precision = " and ".join(sorted({"bfloat16" if r["bf16"] else "float32" for r in rows.values() if "bf16" in r}))
    return f"{found['machine'] or 'No machine yet'}, torch {found['torch']}, {precision}"


def section(network: str, rows: Rows) -> list[str]:
    """The table of a network: accuracy by method and epochs."""
    of = {key[1:]: row for key, row in rows.items() if key[0] == network}
    epochs = sorted({count for method, count in of if method != ORIGINAL})
    original = of.get((ORIGINAL, 0), {}).get("accuracy")
    known = {n: max((r[n] for r in of.values() if n in r), default=0) for n in ("train_images", "test_images")}
    title, base = TITLES[network], "" if original is None else f", original {original:.2f} %"
    lines = [f"## {title.title}, {title.dataset}, {NETWORKS[network]:.0%} of the FLOPs", ""]
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in known.items() if count]
    lines += [f"Top-1 accuracy in %{base}; {', '.join(counts)}. Columns: epochs.", ""]
    lines.append("| method | FLOPs | parameters | " + " | ".join(map(str, epochs)) + " |")
    lines.append("|---|--:|--:|" + "--:|" * len(epochs))
    for method in COMPARED:
        found = {count: row for (name, count), row in of.items() if name == method}
        sizes = [spread([r[n] for r in found.values() if n in r]) for n in ("flops", "parameters")]
        if found:
            lines.append(f"| {method} | " + " | ".join([*sizes, *(cell(found.get(count)) for count in epochs)]) + " |")
    failed = {row["error"]: f"{method} {count}" for (method, count), row in of.items() if "error" in row}
    return [*lines, "", *(f"- {which}: {escaped(short(why, 300))}" for why, which in failed.items()), ""]


def cell(row: Row | None) -> str:
    """The accuracy of a row."""
    return "-" if row is None else f"{row['accuracy']:.2f}" if "accuracy" in row else "failed"


def spread(shares: list[float]) -> str:
    """A share in %, or the smallest and the largest."""
    texts = sorted({f"{share:.1%}" for share in shares})
    return "" if not texts else texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def plot(rows: Rows, path: Path) -> None:
    """The share of wrong answers against epochs, one panel for each network. ImportError without matplotlib."""
    plt = pyplot()
    networks = [n for n in NETWORKS if any(key[0] == n and "accuracy" in row for key, row in rows.items())]
    if not networks:
        return
    figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks), 4), squeeze=False, layout="constrained")
    for axis, network in zip(axes[0], networks, strict=True):
        for at, method in enumerate(COMPARED):
            of = {key[2]: row for key, row in rows.items() if key[:2] == (network, method)}
            points = sorted((count, 100 - row["accuracy"]) for count, row in of.items() if "accuracy" in row)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method, color=f"C{at}")
        original = rows.get((network, ORIGINAL, 0), {}).get("accuracy")
        if original is not None:
            axis.axhline(100 - original, color="grey", linestyle=":")
        axis.set_xscale("symlog", linthresh=1)
        axis.set_xlim(left=-0.1)
        axis.set(title=TITLES[network].title, xlabel="epochs", ylabel="top-1 error, %", yscale="log")
        axis.set_xticks(sorted({key[2] for key in rows if key[0] == network}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0][0].legend(fontsize="small")
    save_plot(figure, path)
