"""DOT, SVG, Mermaid, GraphML, Model Explorer and JSON can be read by their own programs, whatever the layers' names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxmerge
from fxmerge.graph.compare import Verdict
from fxmerge.report.picture import formats
from fxmerge.report.picture.frames import nested, overview
from fxmerge.report.picture.records import Arrow
from tests.helpers.drawings import NASTY, Named, nasty, wide
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")
needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="no program `dot`: install graphviz")
SCHEMA = Path(fxmerge.__file__).parent / "assets" / "report.schema.json"
SVG = "{http://www.w3.org/2000/svg}"


def merged(name: str, **options: Any) -> fxmerge.Result:
    model, x = NETS[name]()
    return plain_merge(model, x, ratio=0.5, **options)


def read_by_graphviz(text: str) -> dict[str, Any]:
    done = subprocess.run(["dot", "-Tdot_json"], input=text, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@needs_graphviz
@pytest.mark.parametrize("name", NETS)
def test_graphviz_reads_the_dot_as_it_was_meant(name: str) -> None:
    report = merged(name).report
    data = read_by_graphviz(report.dot())
    objects = data["objects"]
    names = {o["_gvid"]: o["name"] for o in objects}
    assert {n for n in names.values() if not n.startswith("cluster_")} == {b.id for b in report.picture.boxes}
    found = {(names[e["tail"]], names[e["head"]]) for e in data.get("edges", [])}
    assert found == {(a.source, a.target) for a in report.picture.arrows}


@needs_graphviz
def test_names_survive_dot_and_svg() -> None:
    report = fxmerge.analyze(Named().eval(), torch.randn(1, 3, 2, 2)).report
    texts = [t.text or "" for t in ET.fromstring(report.svg()).iter(f"{SVG}text")]
    assert set(Named.names) <= set(texts)
    objects = read_by_graphviz(formats.dot(nasty()))["objects"]
    assert {o["name"].replace("\\\\", "\\") for o in objects} >= {name for name in NASTY if name.isprintable()}
    text = formats.svg(nasty())
    ET.fromstring(text)
    assert "<script" not in text


@needs_graphviz
def test_the_svg_shows_every_box_with_its_widths(tmp_path: Path) -> None:
    report = merged("residual").report
    path = tmp_path / "net.svg"
    text = report.svg(path)
    assert path.read_text(encoding="utf-8") == text
    texts = [t.text or "" for t in ET.fromstring(text).iter(f"{SVG}text")]
    assert {"stem · n", "a · an", "b · bn", "add", "fc"} <= set(texts)
    assert any(t.endswith("16 → 8 (-50 %)") for t in texts)


def test_svg_without_graphviz_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(fxmerge.FxMergeError, match=r"install graphviz .*or use \.html"):
        merged("residual").report.svg()


@needs_graphviz
def test_a_picture_that_graphviz_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "dot", lambda picture: "digraph {")
    with pytest.raises(fxmerge.FxMergeError, match=r"Graphviz could not draw this picture: .*use \.html"):
        merged("residual").report.svg()


NODE = re.compile(r'\s*(n\d+)\["([^"]*)"\]')
FRAME = re.compile(r'\s*subgraph f\d+\["[^"]*"\]')
ARROW = re.compile(r"\s*(n\d+) --> (n\d+)")
STYLE = re.compile(r"\s*(classDef|class|linkStyle) [\w,]+ [\w:#,.\- ]+")


@pytest.mark.parametrize("name", NETS)
def test_mermaid_has_every_box_and_arrow(name: str) -> None:
    report = merged(name).report
    head, *lines = report.mermaid().splitlines()
    assert head == "flowchart TD"
    nodes = [m for line in lines if (m := NODE.fullmatch(line))]
    arrows = [m for line in lines if (m := ARROW.fullmatch(line))]
    others = [x for x in lines if not NODE.fullmatch(x) and not ARROW.fullmatch(x)]
    assert all(FRAME.fullmatch(x) or STYLE.fullmatch(x) or x.strip() == "end" for x in others), others
    assert sum(bool(FRAME.fullmatch(x)) for x in others) == sum(x.strip() == "end" for x in others)
    shown = overview(report.picture, formats.MERMAID_BOXES)
    assert len(nodes) == len(shown.boxes)
    number = {b.id: f"n{at}" for at, b in enumerate(shown.boxes)}
    assert {(m[1], m[2]) for m in arrows} == {(number[a.source], number[a.target]) for a in shown.arrows}


def test_names_in_mermaid_are_entities() -> None:
    text = formats.mermaid(nasty())
    assert "#60;script#62;alert#40;1#41;#60;#47;script#62;" in text
    lines = [line for line in text.splitlines() if "[" in line]
    assert len(lines) == 2 * len(NASTY)
    assert all(NODE.fullmatch(line) or FRAME.fullmatch(line) for line in lines), lines


@needs_graphviz
def test_ten_thousand_layers_stay_small() -> None:
    picture = wide(10_000)
    text = formats.mermaid(picture)
    assert sum(bool(NODE.fullmatch(x)) for x in text.splitlines()) <= formats.MERMAID_BOXES
    assert sum(bool(ARROW.fullmatch(x)) for x in text.splitlines()) <= formats.MERMAID_ARROWS
    shown = ET.fromstring(formats.svg(picture))
    assert sum(g.get("class") == "node" for g in shown.iter(f"{SVG}g")) <= formats.SVG_BOXES
    assert formats.dot(picture).count(" -> ") == len(picture.arrows)


def test_mermaid_closes_frames_until_arrows_fit() -> None:
    picture = wide(60)
    fan = [Arrow(f"n{i}", f"n{j}", ()) for i in range(60) for j in range(i + 1, 60)]
    homes = [f"half{i // 30}" for i in range(60)]
    places, frames = nested(homes)
    boxes = [replace(b, frame=f) for b, (f, _) in zip(picture.boxes, places, strict=True)]
    dense = replace(picture, boxes=tuple(boxes), arrows=tuple(fan), frames=tuple(frames))
    assert len(fan) > formats.MERMAID_ARROWS
    assert formats.mermaid(dense).count(" --> ") == 1


def test_model_explorer_reads_node_data_and_graph(tmp_path: Path) -> None:
    report = merged("residual").report
    text = report.model_explorer(tmp_path / "net.json")
    data = json.loads(text)
    assert (tmp_path / "net.json").read_text() == text
    graph = json.loads((tmp_path / "net.graph.json").read_text())
    nodes = {n["id"]: n for n in graph["graphs"][0]["nodes"]}
    assert list(data) == [graph["graphs"][0]["id"]]
    assert set(data["main"]["results"]) == set(nodes) == {b.id for b in report.picture.boxes}
    assert data["main"]["results"]["a"]["value"] == 50.0
    assert data["main"]["results"]["fc"]["value"] == 100.0
    sources = {(e["sourceNodeId"], n["id"]) for n in nodes.values() for e in n["incomingEdges"]}
    assert sources == {(a.source, a.target) for a in report.picture.arrows}
    assert {"key": "channels", "value": "16 → 8 (-50 %)"} in nodes["a"]["attrs"]


@pytest.mark.parametrize("name", NETS)
def test_json_keeps_its_schema(name: str) -> None:
    check = pytest.importorskip("jsonschema").Draft202012Validator(json.loads(SCHEMA.read_text())).validate
    result = merged(name)
    data = json.loads(result.report.json())
    check(data)
    check(json.loads(result.analysis.report.json()))
    for group in data["groups"]:
        alone = 0 if "components" in group else len(group["partners"])  # components have no partners
        assert len(group["kept"]) + alone == group["channels"] or "components" in group
    with pytest.raises(Exception, match="extra"):
        check({**data, "extra": 1})


def test_json_of_a_refit_and_of_what_is_not_finite() -> None:
    check = pytest.importorskip("jsonschema").Draft202012Validator(json.loads(SCHEMA.read_text())).validate
    model, x = NETS["residual"]()
    result = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=8)
    data = json.loads(result.report.json())
    check(data)
    assert {r["name"] for r in data["refit"]} <= {n for n, _ in model.named_modules()}
    text = replace(result.report, verdict=Verdict(float("inf"))).json()
    check(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")))
    assert json.loads(text)["error"] is None


def test_same_model_same_bytes() -> None:
    one, other = merged("dense").report, merged("dense").report
    for way in ("json", "dot", "mermaid", "graphml", "model_explorer", *(["svg"] if shutil.which("dot") else [])):
        assert getattr(one, way)() == getattr(other, way)(), way


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(fxmerge.FxMergeError, match=r"the folder .*none for x.dot does not exist; create it first"):
        merged("residual").report.dot(tmp_path / "none" / "x.dot")
