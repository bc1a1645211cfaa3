"""docs/coverage.md from the rows of benchmarks.coverage: summary, table of each suite, what failed and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Key = tuple[str, str, str]  # suite, name, tool
Row = dict[str, Any]

TOOLS = ("fxmerge", "peer")
EXACT = 1e-10  # oracle 1 in float64: above this the analysis is wrong
MARGIN = 0.05  # left over the peer's by more than this is worth a look
OUTPUT = "is the model's output"

INTRODUCTION = """\
# Coverage

`python -m benchmarks.coverage` makes this page: random weights, one process for each model, one thread, CPU seconds.

- *left*: parameters at ratio 0.5 over those before, `decomposition="prune"`, `scope="all"`. Layers that the graph does
  not call count as left.
- *captured*: the graph's origin, `symbolic` (torch.fx), `export` (torch.export) or parts of the model.
- *oracle 1*: relative change of the float64 output when channels are permuted wherever the analysis says that they
  live, all groups together and then one by one; *(n)*: time was enough for n groups one by one.
- *peer*: Torch-Pruning 1.6.1, `MagnitudePruner` with `GroupMagnitudeImportance`, ratio 0.5, as its own examples use it;
  the pruned model must run on the same inputs. *s*: its seconds for building the pruner and pruning.
- *note*: why it failed, else what kept channels from being merged, outputs left out.
"""
HEADER = "| model | parameters | captured | groups | left | analysis, s | merge, s | oracle 1 | peer: left | s | note |"
RULE = "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|---|"


def page(rows: Mapping[Key, Row], remark: str = "") -> str:
    """The whole page; `remark` says how the rows were measured."""
    suites = sorted({suite for suite, _, tool in rows}, key=lambda s: (s != "torchvision", s != "timm", s))
    parts = [INTRODUCTION, *([remark, ""] if remark else []), *summary("all", rows)]
    for suite in suites:
        inside = {key: row for key, row in rows.items() if key[0] == suite}
        names = sorted({name for _, name, _ in inside})
        lines = [line(inside.get((suite, n, "fxmerge")), inside.get((suite, n, "peer")), n) for n in names]
        parts += ["", f"## {suite}", "", *summary(suite, inside), "", HEADER, RULE, *lines]
    return "\n".join([*parts, *failures(rows)]) + "\n"


def summary(title: str, rows: Mapping[Key, Row]) -> list[str]:
    """The lines above a table: how many merged, medians, what to look at."""
    ours = [row for key, row in sorted(rows.items()) if key[2] == "fxmerge"]
    theirs = {key[:2]: row for key, row in rows.items() if key[2] == "peer"}
    merged = [row for row in ours if row["status"] == "ok" and row["groups"]]
    right = [row for row in merged if row.get("oracle", 1.0) <= EXACT]
    idle = [row["name"] for row in ours if row["status"] == "ok" and not row["groups"]]
    wrong = [f"{row['name']} ({row['oracle']:.0e})" for row in merged if row.get("oracle", 0.0) > EXACT]
    out = [f"- {title}: {len(merged)} of {len(ours)} models merged, {len(right)} of them with oracle 1 <= {EXACT:.0e}"]
    if merged:
        seconds = f"analysis {median(r['analysis_s'] for r in merged):.1f} s, merge {_median(merged, 'merge_s')} s"
        out.append(f"- medians: {100 * median(r['left'] for r in merged):.1f} % of the parameters left, {seconds}")
    out.append(f"- oracle 1 > {EXACT:.0e}: {_listed(wrong)}")
    if idle:
        out.append(f"- ran, but there was nothing to merge: {_listed(idle)}")
    other = [row["name"] for row in merged if not row.get("shapes_kept", True)]
    if other:
        out.append(f"- outputs of other shapes: {_listed(other)}")
    if theirs:
        pruned = [row for row in theirs.values() if row["status"] == "ok"]
        kept = sum(row.get("shapes_kept", False) for row in pruned)
        times = f", median {_median(pruned, 'merge_s')} s" if pruned else ""
        out.append(f"- peer: {len(pruned)} of {len(theirs)} pruned, {kept} of them with outputs of their shape{times}")
        pairs = [(row, theirs.get((row["suite"], row["name"]))) for row in merged]
        both = [(row, p) for row, p in pairs if p and p["status"] == "ok"]
        if both:
            ours_s, theirs_s = (_median([pair[at] for pair in both], "merge_s") for at in (0, 1))
            out.append(f"- the {len(both)} models that both did: median {ours_s} s for a merge, the peer {theirs_s} s")
        more = [f"{r['name']} (+{100 * (r['left'] - p['left']):.0f})" for r, p in pairs if p and _more(r, p)]
        out.append(f"- more left than the peer by over {100 * MARGIN:.0f} points: {_listed(more)}")
        pruned_keys = {key for key, row in theirs.items() if row["status"] == "ok" and row.get("shapes_kept")}
        lost = [r["name"] for r in ours if r["status"] != "ok" and (r["suite"], r["name"]) in pruned_keys]
        out.append(f"- pruned by the peer but not merged: {_listed(lost)}")
    return out


def _more(row: Row, peer: Row) -> bool:
    """Is more left than the peer leaves? One that changes the shape of the output does not count."""
    return peer["status"] == "ok" and bool(peer.get("shapes_kept")) and row["left"] > peer["left"] + MARGIN


def _median(rows: Sequence[Row], field: str) -> str:
    return f"{median(row[field] for row in rows):.2f}"


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def line(ours: Row | None, theirs: Row | None, name: str) -> str:
    """One model's row of the table; a cell without a number says why or stays empty."""
    own, peer = ours or {}, theirs or {}
    groups = str(own["groups"]) if "groups" in own else ""
    cells = [
        name,
        _millions((own or peer).get("parameters")),
        own.get("route", ""),
        groups,
        _percent(own),
        _number(own, "analysis_s"),
        _number(own, "merge_s"),
        oracle(own),
        _peer(peer),
        _number(peer, "merge_s"),
        note(own),
    ]
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return text.replace("\n", " ").replace("|", "\\|").replace("<", "\\<")


def oracle(row: Row) -> str:
    """Oracle 1's error, or why there is none."""
    if "oracle" not in row:
        return short(row.get("oracle_note", ""), 40)
    tried = row.get("oracle_tried", 0)
    some = f" ({tried})" if tried < row.get("groups", 0) else ""
    value = f"{row['oracle']:.0e}{some}"
    return f"**{value}**" if row["oracle"] > EXACT else value


def note(row: Row) -> str:
    """Why a model failed; else the reason that keeps most channels, where it is more than the model's output."""
    if row.get("status") == "failed":
        return short(row.get("error", "failed"), 160)
    parts = [] if row.get("shapes_kept", True) else ["outputs have other shapes"]
    reasons = [(why, n) for why, n in row.get("refused", []) if why != OUTPUT]
    whole = row.get("channels", 0) + sum(n for _, n in row.get("refused", []))
    if reasons and reasons[0][1] > 0.05 * whole:
        parts.append(f"{100 * reasons[0][1] / whole:.0f} % of channels: {short(reasons[0][0], 120)}")
    return "; ".join(parts)


def short(text: str, length: int) -> str:
    """The text, cut off at a length."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _millions(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f} M"


def _percent(row: Row) -> str:
    if row.get("status") == "failed":
        return "**failed**"
    return f"{100 * row['left']:.1f} %" if "left" in row else ""


def _number(row: Row, field: str) -> str:
    return f"{row[field]:.1f}" if field in row else ""


def _peer(row: Row) -> str:
    if row.get("status") == "failed":
        return short(row.get("error", "failed"), 60)
    other = "" if row.get("shapes_kept", True) else ", other output"
    return _percent(row) + other if row else ""


def failures(rows: Mapping[Key, Row]) -> Iterable[str]:
    """What failed, most frequent message first, and the reasons that keep channels, by channels."""
    why: dict[str, list[str]] = {}
    for (_, name, tool), row in sorted(rows.items()):
        if tool == "fxmerge" and row["status"] == "failed":
            why.setdefault(general(row.get("error", "failed")), []).append(name)
    kept, models = Counter[str](), Counter[str]()
    for (_, _, tool), row in rows.items():
        for reason, channels in row.get("refused", []) if tool == "fxmerge" else []:
            if reason != OUTPUT:
                kept[reason] += channels
                models[reason] += 1
    if why:
        yield from ("", "## What failed", "", "| models | message | which |", "|--:|---|---|")
        for message, names in sorted(why.items(), key=lambda item: -len(item[1])):
            yield f"| {len(names)} | {escaped(short(message, 300))} | {', '.join(names)} |"
    if kept:
        yield from ("", "## What keeps channels", "", "| models | channels | reason |", "|--:|--:|---|")
        for reason, channels in kept.most_common(30):
            yield f"| {models[reason]} | {channels:,} | {escaped(short(reason, 200))} |"


def general(message: str) -> str:
    """A message without the class that it begins with, so that models which fail alike stand together."""
    first, _, rest = message.partition(" ")
    return rest if rest and first[:1].isupper() and first.isalnum() else message
