"""Write the listings of docs/architecture.md: each stage of the pipeline on one small network.

    python docs/running_example.py            # write every listing between its markers
    python docs/running_example.py --check    # fail where a listing is not up to date

A listing stands between `<!-- listing: NAME -->` and `<!-- end -->`; `LISTINGS` maps each name to its text.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import tempfile
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir.groups import Group, survivors
from fxmerge.ir.labels import thin
from fxmerge.plan import planned

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("architecture.md")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(4)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.head(self.pool(x + y).flatten(1))


def made() -> tuple[Net, Tensor]:
    """The network and its example inputs. Channels 0 and 1, 2 and 3, ... of its convolutions are nearly parallel."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def repeated(weight: Tensor, scale: float) -> Tensor:
        first = random(len(weight) // 2, *weight.shape[1:])
        second = scale * first + 0.2 * random(*first.shape)
        return torch.stack([first, second], 1).flatten(0, 1) / weight[0].numel() ** 0.5

    net = Net()
    with torch.no_grad():
        net.stem.weight.copy_(repeated(net.stem.weight, 1.5))
        net.conv1.weight.copy_(repeated(net.conv1.weight, 1.0))
        net.conv2.weight.copy_(repeated(net.conv2.weight, 1.5))
        net.head.weight.copy_(random(2, 16) / 4)
        for layer in (net.stem, net.conv2, net.head):
            layer.bias.zero_()
        net.bn1.weight.copy_(torch.tensor([0.7, 1.4, 1.6, 0.8, 0.9, 1.8]))
        net.bn1.bias.copy_(torch.tensor([0.2, 0.4, 0.6, 0.3, 0.4, 0.8]))
        net.bn1.momentum = None  # the running statistics are those of all batches seen
        net(random(64, 3, 8, 8))
    return net.eval(), random(2, 3, 8, 8)


@cache
def result() -> fxmerge.Result:
    net, x = made()
    return fxmerge.merge(net, x, ratio=0.5)


def table(*rows: tuple[object, ...]) -> str:
    """Rows as text, columns flush left and two spaces apart."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in text) for at in range(len(text[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in text)


def numbers(labels: Tensor) -> str:
    """Label numbers, runs of equal ones and ascending ones abbreviated: `12..17`, `1x4 2x4`."""
    found: list[str] = []
    values = labels.flatten().tolist()
    while values:
        same = next((i for i, v in enumerate(values) if v != values[0]), len(values))
        run = next((i for i, v in enumerate(values) if v != values[0] + i), len(values))
        size = max(same, run)
        more = "" if size == 1 else f"x{same}" if same > run else f"..{values[run - 1]}"
        found.append(f"{values[0]}{more}")
        values = values[size:]
    return " ".join(found)


def places(indices: Tensor) -> str:
    return "{" + ", ".join(map(str, indices.flatten().tolist())) + "}"


def here(where: str) -> str:
    """The user's source line, without the folder that this file is in and the number of the line."""
    return re.sub(r"^.*/([\w.]+):\d+", r"\1", where)


def source() -> str:
    return inspect.getsource(Net).rstrip()


def graph() -> str:
    captured = result().analysis.captured
    rows = [
        (node.name, node.op, getattr(node.target, "__name__", node.target), tuple(captured.shapes[node.name]))
        for node in captured.module.graph.nodes
        if node.op != "output"
    ]
    return table(("node", "op", "target", "shape"), *rows)


def labels() -> str:
    facts = result().analysis.facts
    rows = [
        (name, facts.kinds[name], numbers(thin(held)), " x ".join(map(str, thin(held).shape)))
        for name, held in facts.labels.items()
    ]
    return table(("node", "kind of op", "labels", "stored as"), *rows)


def ties() -> str:
    facts = result().analysis.facts
    rows = [(t.node, numbers(t.left), "=", numbers(t.right)) for t in facts.ties]
    pins = [f"pin  {p.node}: {numbers(p.labels)}  {p.reason}  [{here(p.where)}]" for p in facts.pins]
    return "\n".join([table(*rows), "", *pins])


def layers() -> str:
    def named(held: Tensor | None) -> str:
        return "-" if held is None else numbers(held)

    facts = result().analysis.facts
    rows = [(x.module, named(x.reads), named(x.writes), named(x.carries)) for x in facts.layers]
    return table(("layer", "reads", "writes", "carries"), *rows)


def groups() -> str:
    analysis = result().analysis
    atom = analysis.grouping.atom
    text = []
    for group in analysis.groups:
        text.append(f"group {group.name}: {group.channels} channels")
        for channel, a in enumerate(group.atoms.tolist()):
            text.append(f"  channel {channel} = labels {places((atom == a).nonzero())}")
        for role, members in (
            ("producer", group.producers),
            ("per-channel parameter", group.per_channel_params),
            ("consumer", group.consumers),
        ):
            for member in members:
                steps = f", steps {' -> '.join(member.steps)}" if member.steps else ""
                first = ", ".join(map(str, member.where[0].tolist()))
                text.append(f"  {role} {member.layer.module}: channel 0 at {first}{steps}")
        text.append("")
    for refusal in analysis.refusals:
        text.append(f"refused {refusal.name}: {refusal.channels} channels, {refusal.reason}  [{here(refusal.where)}]")
    return "\n".join(text)


def plan() -> str:
    text = []
    for group in result().plan.groups:
        text.append(f"{group.name}: {group.channels} -> {len(group.kept)} channels, kept {list(group.kept)}")
        for p in group.partners:
            into = f"{p.scale:.1f} x channel {p.into} (cosine {p.cosine:.2f})" if p.into >= 0 else "nobody"
            text.append(f"  channel {p.channel} is carried by {into}")
    return "\n".join(text)


def alive() -> str:
    analysis = result().analysis
    kept: list[tuple[Group, Tensor]] = planned(analysis.groups, result().plan)
    stays = survivors(analysis.grouping, kept)
    rows = []
    for path, before in analysis.captured.module.named_parameters():
        held = analysis.facts.params[path]
        left = "; ".join(
            f"axis {axis}: {numbers(along[stays[along]])} of {numbers(along)}"
            for axis, along in held.axes.items()
            if not bool(stays[along].all())
        )
        rows.append((path, list(before.shape), list(result().module.get_parameter(path).shape), left or "as it was"))
    return table(("parameter", "before", "after", "labels that stay"), *rows)


def added() -> str:
    before = {name for name, _ in result().analysis.captured.module.named_parameters()}
    return ", ".join(name for name, _ in result().module.named_parameters() if name not in before)


def code() -> str:
    """The class in the saved model.py."""
    with tempfile.TemporaryDirectory() as folder:
        result().save(Path(folder) / "merged")
        text = (Path(folder) / "merged" / "model.py").read_text(encoding="utf-8")
    return text[text.index("class ") : text.index("def load")].rstrip()


def refit() -> str:
    rows = [(r.name, f"{r.before:.0e}", f"{r.after:.0e}") for r in result().report.refitted]
    return table(("layer", "relative square error before", "after"), *rows)


def report() -> str:
    """The totals of the report's text."""
    found: str = result().report.text()
    lines = [line.rstrip() for line in found.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("parameters "))
    return re.sub(r"(inputs: )([\d.e+-]+)", lambda m: f"{m[1]}{float(m[2]):.0e}", "\n".join(lines[start:]))


def layout() -> str:
    """The package's folders and files."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "fxmerge").rglob("*.py")):
        folder = path.parent.relative_to(ROOT).as_posix()
        found.setdefault(folder, []).extend([] if path.name == "__init__.py" else [path.stem])
    return table(*((f"{folder}/", "  ".join(files)) for folder, files in sorted(found.items())))


def contract() -> str:
    """The rows of the import contract."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    rows = config["importlinter:contract:order"]["layers"].split("\n")
    return "\n".join(row.strip() for row in rows if row.strip() and row.strip() != "(__main__)")


LISTINGS = {
    f.__name__: f
    for f in (source, graph, labels, layers, ties, groups, plan, alive, added, code, refit, report, layout, contract)
}
LANGUAGE = {"source": "python", "code": "python"}


def written(page: str) -> str:
    """The page with every listing as it is today. Raises KeyError for a name that is not in LISTINGS."""

    def listing(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- listing: {name} -->\n```{LANGUAGE.get(name, '')}\n{LISTINGS[name]()}\n```\n<!-- end -->"

    return re.sub(r"<!-- listing: (\w+) -->\n.*?<!-- end -->", listing, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a listing is not up to date")
    asked = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    now = written(page)
    if asked.check:
        if now != page:
            print(f"{PAGE.name} is not up to date: run python docs/running_example.py", file=sys.stderr)
        return int(now != page)
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
