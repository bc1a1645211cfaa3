"""Write docs/coverage.md from the rows of benchmarks.coverage: summary, one table for each suite, failures."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.harness.page import escaped, short
from benchmarks.harness.rows import Row

Key = tuple[Any, ...]  # suite, name, tool

TOOLS = ("fxmerge", "peer")
EXACT = 1e-10  # bound of oracles 1 and 6 in float64: above it the analysis or the capture is wrong
MARGIN = 0.05  # models where the peer leaves less by more than this are listed
OUTPUT = "is the model's output"

INTRODUCTION = """\
# Coverage

`python -m benchmarks.coverage` writes this page: random weights, one process for each model, one thread, CPU seconds.

- *left*: share of the parameters left at ratio 0.5 with `decomposition="prune"` and `scope="all"`. Layers that the
  graph does not call count as left.
- *captured*: where the graph comes from: `symbolic` (torch.fx), `export` (torch.export), or `recorded` part by part.
- *oracle 1*: relative change of the float64 output when the channels of a group are permuted in every place that the
  analysis found; first all groups together, then one by one. *(n)*: the time was sufficient for n groups one by one.
- *oracle 6*: relative difference, in float64 and on inputs that were not seen before, between the merged model and the
  original with the dropped channels set to zero; all groups together, then one by one, as above. *-n*: n groups are
  left out, most of them because a norm couples their channels. *g*: the zeros were set in the captured graph instead,
  because a weight is not a parameter of the model, or because the model does not run in float64.
- *peer*: Torch-Pruning 1.6.1, `MagnitudePruner` with `GroupMagnitudeImportance`, ratio 0.5, as in its own examples;
  the pruned model must run on the same inputs. *s*: seconds to build the pruner and to prune.
- *note*: why the model failed, or else why channels were not merged (other than being the model's output).
"""
HEADER = (
    "| model | parameters | captured | groups | left | analysis, s | merge, s | oracle 1 | oracle 6 | peer: left | s "
    "| note |"
)
RULE = "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"


def page(rows: Mapping[Key, Row], remark: str = "") -> str:
    """The page. `remark` is a line on how the rows were measured."""
    suites = sorted({suite for suite, _, tool in rows}, key=lambda s: (s != "torchvision", s != "timm", s))
    parts = [INTRODUCTION, *([remark, ""] if remark else []), *summary("all", rows)]
    for suite in suites:
        inside = {key: row for key, row in rows.items() if key[0] == suite}
        names = sorted({name for _, name, _ in inside})
        lines = [line(inside.get((suite, n, "fxmerge")), inside.get((suite, n, "peer")), n) for n in names]
        parts += ["", f"## {suite}", "", *summary(suite, inside), "", HEADER, RULE, *lines]
    return "\n".join([*parts, *failures(rows)]) + "\n"


def summary(title: str, rows: Mapping[Key, Row]) -> list[str]:
    """The lines above a table: number of merged models, medians, and the models to look at."""
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
    if any("silence" in row for row in merged):
        agree = [row for row in merged if (row.get("silence") if row.get("silence") is not None else 1.0) <= EXACT]
        loud = [f"{row['name']} ({row['silence']:.0e})" for row in merged if (row.get("silence") or 0.0) > EXACT]
        out.append(f"- oracle 6 <= {EXACT:.0e}: {len(agree)} models; above: {_listed(loud)}")
    if idle:
        out.append(f"- ran, but have no merge groups: {_listed(idle)}")
    other = [row["name"] for row in merged if not row.get("shapes_kept", True)]
    if other:
        out.append(f"- outputs with different shapes: {_listed(other)}")
    if theirs:
        pruned = [row for row in theirs.values() if row["status"] == "ok"]
        kept = sum(row.get("shapes_kept", False) for row in pruned)
        times = f", median {_median(pruned, 'merge_s')} s" if pruned else ""
        out.append(f"- peer: {len(pruned)} of {len(theirs)} pruned, {kept} of them with the same output shapes{times}")
        pairs = [(row, theirs.get((row["suite"], row["name"]))) for row in merged]
        both = [(row, p) for row, p in pairs if p and p["status"] == "ok"]
        if both:
            ours_s, theirs_s = (_median([pair[at] for pair in both], "merge_s") for at in (0, 1))
            seconds = f"median {ours_s} s with fxmerge, {theirs_s} s with the peer"
            out.append(f"- the {len(both)} models that both tools handle: {seconds}")
        more = [f"{r['name']} (+{100 * (r['left'] - p['left']):.0f})" for r, p in pairs if p and _more(r, p)]
        out.append(f"- more parameters left than with the peer, by over {100 * MARGIN:.0f} points: {_listed(more)}")
        pruned_keys = {key for key, row in theirs.items() if row["status"] == "ok" and row.get("shapes_kept")}
        lost = [r["name"] for r in ours if r["status"] != "ok" and (r["suite"], r["name"]) in pruned_keys]
        out.append(f"- pruned by the peer but not merged: {_listed(lost)}")
    return out


def _more(row: Row, peer: Row) -> bool:
    """Whether more is left than with the peer. A peer that changes the shape of the output does not count."""
    return peer["status"] == "ok" and bool(peer.get("shapes_kept")) and row["left"] > peer["left"] + MARGIN


def _median(rows: Sequence[Row], field: str) -> str:
    return f"{median(row[field] for row in rows):.2f}"


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(names)}" if names else "none"


def line(ours: Row | None, theirs: Row | None, name: str) -> str:
    """The row of one model in the table. A cell without a number has the reason or is empty."""
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
        silence(own),
        _peer(peer),
        _number(peer, "merge_s"),
        note(own),
    ]
    return "| " + " | ".join(map(escaped, cells)) + " |"


def oracle(row: Row) -> str:
    """The error of oracle 1, or why there is none."""
    if "oracle" not in row:
        return short(row.get("oracle_note", ""), 40)
    tried = row.get("oracle_tried", 0)
    some = f" ({tried})" if tried < row.get("groups", 0) else ""
    value = f"{row['oracle']:.0e}{some}"
    return f"**{value}**" if row["oracle"] > EXACT else value


def silence(row: Row) -> str:
    """The error of oracle 6, how many groups it left out, or why there is none."""
    if row.get("silence") is None:
        return short(row.get("silence_note", ""), 40)
    some = f" ({row['silence_tried']})" if row.get("silence_tried", 0) < row.get("silence_groups", 0) else ""
    left_out = f" -{row['silence_left_out']}" if row.get("silence_left_out") else ""
    value = f"{row['silence']:.0e}{some}{left_out}{' g' if row.get('silence_on_graph') else ''}"
    return f"**{value}**" if row["silence"] > EXACT else value


def note(row: Row) -> str:
    """Why a model failed, or else the most frequent reason, other than the output, why channels were not merged."""
    if row.get("status") == "failed":
        return short(row.get("error", "failed"), 160)
    parts = [] if row.get("shapes_kept", True) else ["outputs have different shapes"]
    reasons = [(why, n) for why, n in row.get("refused", []) if why != OUTPUT]
    total = row.get("channels", 0) + sum(n for _, n in row.get("refused", []))
    if reasons and reasons[0][1] > 0.05 * total:
        parts.append(f"{100 * reasons[0][1] / total:.0f} % of channels: {short(reasons[0][0], 120)}")
    return "; ".join(parts)


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
    other = "" if row.get("shapes_kept", True) else ", different output"
    return _percent(row) + other if row else ""


def failures(rows: Mapping[Key, Row]) -> Iterable[str]:
    """The failures, most frequent message first, and the reasons why channels were not merged, most channels first."""
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
        yield from ("", "## Failures", "", "| models | message | names |", "|--:|---|---|")
        for message, names in sorted(why.items(), key=lambda item: -len(item[1])):
            yield f"| {len(names)} | {escaped(short(message, 300))} | {', '.join(names)} |"
    if kept:
        yield from ("", "## Why channels are not merged", "", "| models | channels | reason |", "|--:|--:|---|")
        for reason, channels in kept.most_common(30):
            yield f"| {models[reason]} | {channels:,} | {escaped(short(reason, 200))} |"


def general(message: str) -> str:
    """A message without the class name at its start, so that equal failures are counted together."""
    first, _, rest = message.partition(" ")
    return rest if rest and first[:1].isupper() and first.isalnum() else message
