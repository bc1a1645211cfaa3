"""The pictures that explain Neuron Merging: `python -m benchmarks.demo.merging --out docs`.

They show the LeNet-300-100 that is part of the package, with half of its neurons merged:

    merging_pairs.svg     pairs of a dropped and a kept neuron: their weights as images, and their outputs
    merging_absorbed.svg  one column of the next layer, before and after it absorbed the dropped neuron's column
    merging_curve.svg     accuracy by the share of neurons that are dropped
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxmerge
from fxmerge.cli.demo import METHODS, example, run
from fxmerge.plan import Partner

GROUP, SHOWN = "ip1", 3
RATIO = 0.5


def pairs(model: torch.nn.Module, images: Tensor) -> list[Partner]:
    """The pairs of `GROUP` with the largest cosines that fire on at least a tenth of the images."""
    merged = fxmerge.merge(model, images[:2], METHODS["mostsim"], ratio=RATIO)
    (group,) = (g for g in merged.plan.groups if g.name == GROUP)
    with torch.no_grad():
        fires = (model.ip1(images) > 0).double().mean(0)  # type: ignore[operator]
    found = [p for p in group.partners if p.into >= 0 and fires[p.channel] > 0.1]
    return sorted(found, key=lambda p: -p.cosine)[:SHOWN]


def draw_pairs(axes: Any, model: Any, images: Tensor, found: list[Partner]) -> None:
    with torch.no_grad():
        out = torch.relu(model.ip1(images))
    for row, pair in zip(axes, found, strict=True):
        for ax, channel, word in ((row[0], pair.channel, "dropped"), (row[1], pair.into, "kept")):
            weight = model.ip1.weight[channel].detach().reshape(28, 28)
            span = float(weight.abs().max())
            ax.imshow(weight, cmap="RdBu", vmin=-span, vmax=span)
            ax.set_title(f"{word}: neuron {channel}", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
        kept, dropped = out[:500, pair.into], out[:500, pair.channel]
        row[2].plot(kept, dropped, ".", markersize=3, color="tab:blue")
        end = float(kept.max())
        row[2].plot([0, end], [0, pair.scale * end], color="tab:orange", linewidth=1)
        row[2].set_title(f"cosine {pair.cosine:.2f}, scale {pair.scale:.2f}", fontsize=9)
        row[2].set_xlabel("output of the kept neuron", fontsize=8)
        row[2].set_ylabel("of the dropped one", fontsize=8)
        row[2].tick_params(labelsize=7)


def draw_absorbed(ax: Any, model: Any, pair: Partner) -> None:
    weight = model.ip2.weight.detach()[:12]
    own, other = weight[:, pair.into], pair.scale * weight[:, pair.channel]
    places = torch.arange(len(own))
    ax.bar(places - 0.27, own, 0.27, label=f"weight of neuron {pair.into}, which is kept")
    ax.bar(places, other, 0.27, label=f"{pair.scale:.2f} times that of neuron {pair.channel}, which is dropped")
    ax.bar(places + 0.27, own + other, 0.27, label="their sum: the weight after the merge")
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set_xlabel("first twelve neurons of the next layer")
    ax.set_ylabel("weight")
    ax.legend(fontsize=8)


def draw_curve(ax: Any) -> None:
    rows = run()
    original = rows[0].accuracy
    for method in METHODS:
        own = [r for r in rows if r.method == method]
        ax.plot([0, *(100 * r.ratio for r in own)], [original, *(r.accuracy for r in own)], marker="o", label=method)
    ax.set_xlabel("neurons dropped, %")
    ax.set_ylabel("top-1 accuracy, %")
    ax.legend()
    ax.grid(alpha=0.3)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo.merging", description="Draw the pictures that explain Neuron Merging."
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the SVG files")
    out = parser.parse_args().out
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "fxmerge"  # the same file in every run
    from matplotlib import pyplot

    def save(name: str) -> None:
        pyplot.tight_layout()
        pyplot.savefig(out / name, metadata={"Date": None}, facecolor="white")
        pyplot.close()

    model, images, _ = example()
    found = pairs(model, images)
    draw_pairs(pyplot.subplots(SHOWN, 3, figsize=(7, 2.2 * SHOWN))[1], model, images, found)
    save("merging_pairs.svg")
    draw_absorbed(pyplot.subplots(figsize=(7, 3))[1], model, found[0])
    save("merging_absorbed.svg")
    draw_curve(pyplot.subplots(figsize=(6, 3.2))[1])
    save("merging_curve.svg")


if __name__ == "__main__":
    main()
