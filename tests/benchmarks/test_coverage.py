"""benchmarks.coverage: the models, one row, a run that is resumed, the page."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.coverage import one_model, zoo, zoo_timm, zoo_transformers
from benchmarks.coverage import run as coverage
from benchmarks.coverage.page import page
from benchmarks.harness.process import combined
from benchmarks.harness.rows import append_row
from benchmarks.peers import torch_pruning as peer

ROW = {
    "suite": "timm", "name": "a", "tool": "fxmerge", "status": "ok", "parameters": 2_000_000, "route": "export",
    "groups": 3, "channels": 100, "refused": [["is the model's output", 10], ["topk has no rule", 50]],
    "analysis_s": 1.0, "merge_s": 2.0, "left": 0.4, "shapes_kept": True, "oracle": 1e-15, "oracle_tried": 3,
    "silence": 2e-16, "silence_groups": 2, "silence_tried": 2, "silence_left_out": 1, "silence_on_graph": 0,
}  # fmt: skip


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def table(*rows: dict[str, Any]) -> str:
    return page({(r["suite"], r["name"], r["tool"]): r for r in rows})


@pytest.mark.slow
def test_squeezenet_is_measured() -> None:
    pytest.importorskip("torchvision")
    found = combined(map(json.dumps, one_model.findings("fxmerge", "torchvision", "squeezenet1_1", 0)))
    assert found["status"] == "ok" and found["stage"] == "done" and found["shapes_kept"]
    assert found["route"] == "symbolic" and found["groups"] == 25
    assert 0.3 < found["left"] < 0.4 and found["oracle"] < 1e-10
    assert found["silence"] < 1e-10 and found["silence_groups"] == 25 and found["silence_inputs"] == ["values"]


def test_an_unknown_model_is_a_failure_with_its_message() -> None:
    pytest.importorskip("torchvision")
    found = coverage.with_error(combined(map(json.dumps, one_model.findings("fxmerge", "torchvision", "no", 0))))
    assert found["status"] == "failed" and "no" in found["error"]


def test_torchvision_names() -> None:
    pytest.importorskip("torchvision")
    found = zoo.names("torchvision")
    assert len(found) >= 121


def test_timm_names_are_timm_s() -> None:
    timm = pytest.importorskip("timm")
    assert set(zoo_timm.FAMILIES) <= set(timm.list_modules())
    for family, name in itertools.islice(zoo_timm.FAMILIES.items(), 0, None, 10):
        assert name in timm.list_models(module=family)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration"])
def test_transformers_run(name: str) -> None:
    pytest.importorskip("transformers")
    assert name in zoo_transformers.ARCHITECTURES
    assert one_model.shapes(zoo.build("transformers", name).run())[0] == [1, 12, 120]


def test_constants_become_random_and_batch_norms_fit_the_example() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.LayerNorm(4))
    net[3].weight.data.fill_(1e-6)
    specimen = zoo.Specimen(net.eval(), (100 + 50 * torch.randn(1, 3, 6, 6),))
    generator = torch.Generator().manual_seed(0)
    zoo.vary_constants(net, generator)
    zoo.vary_batch_norms(specimen, generator)
    assert all(len(p.unique()) > 1 for p in net.parameters())
    assert float(net[3].weight.detach().abs().min()) > 0.01
    with torch.no_grad():
        normed = (net[1](net[0](*specimen.inputs)) - net[1].bias[:, None, None]) / net[1].weight[:, None, None]  # type: ignore[operator,index]
    assert 0.7 < float(normed.std()) < 1.6 and float(normed.abs().max()) < 6
    assert len(net[1].running_mean.unique()) == 8  # type: ignore[union-attr,operator]


def test_the_peer_leaves_classifiers() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000))
    assert peer.ignored(net, "torchvision") == [net[1]]


def test_a_run_continues_where_the_last_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fake(key: tuple[str, str, str], *_: Any) -> tuple[dict[str, Any], float]:
        measured.append(key)
        return row(suite=key[0], name=key[1], tool=key[2]), 0.0

    monkeypatch.setattr(coverage, "measure", fake)
    monkeypatch.setattr(coverage, "names", lambda suite: ["a", "b", "c"])
    out = tmp_path / "page.md"
    append_row(tmp_path / "page.jsonl", row())
    arguments = ["--suite", "timm", "--only", "[ab]", "--out", str(out)]
    coverage.main([*arguments, "--no-peer"])
    assert measured == [("timm", "b", "fxmerge")]
    assert "| b | 2.00 M | export |" in out.read_text()
    coverage.main(arguments)
    assert measured[1:] == [("timm", "a", "peer"), ("timm", "b", "peer")]
    coverage.main([*arguments, "--no-peer", "--again"])
    assert measured[3:] == [("timm", "a", "fxmerge"), ("timm", "b", "fxmerge")]


def test_a_process_that_does_not_end() -> None:
    ended = {"stage": "analysis", "ended": "stopped after 1 s"}
    assert coverage.with_error(dict(ended)) == {
        "stage": "analysis", "status": "failed", "error": "stopped after 1 s, in analysis"
    }  # fmt: skip
    found = coverage.with_error({**ended, "status": "ok"})  # it ran out of time in the oracle, not in the merge
    assert found == {"stage": "analysis", "status": "ok", "oracle_note": "stopped after 1 s"}


def test_page() -> None:
    text = table(
        row(),
        row(name="wrong", oracle=1e-3, oracle_tried=0),
        row(name="idle", groups=0, left=1.0),
        row(name="bad", status="failed", error="Bad cannot be traced: a | b"),
        row(name="worse", status="failed", error="Worse cannot be traced: a | b"),
        row(tool="peer", left=0.3, merge_s=7.0),
        row(name="wrong", tool="peer", left=0.1, shapes_kept=False, merge_s=8.0),
        row(name="bad", tool="peer", left=0.3),
    )
    assert "- timm: 2 of 5 models merged, 1 of them with oracle 1 <= 1e-10" in text
    assert "oracle 1 > 1e-10: 1: wrong (1e-03)" in text
    assert "have no merge groups: 1: idle" in text
    assert "more parameters left than with the peer, by over 5 points: 1: a (+10)" in text
    assert "pruned by the peer but not merged: 1: bad" in text
    both = f"median {ROW['merge_s']:.2f} s with fxmerge, 7.50 s with the peer"
    assert f"the 2 models that both tools handle: {both}" in text
    assert "| **1e-03 (0)** |" in text and "31 % of channels: topk has no rule" in text
    assert "oracle 6 <= 1e-10: 2 models; above: none" in text and "| 2e-16 -1 |" in text
    assert "| 2 | cannot be traced: a \\| b | bad, worse |" in text


def test_page_shows_a_red_silence() -> None:
    wrong = row(silence=1e-3, silence_tried=1, silence_on_graph=1)
    text = table(wrong, row(name="b", silence=None, silence_note="why"))
    assert "oracle 6 <= 1e-10: 0 models; above: 1: a (1e-03)" in text
    assert "| **1e-03 (1) -1 g** |" in text and "| why |" in text


def test_an_error_in_the_last_oracle_is_its_note() -> None:
    found = coverage.with_error({"status": "ok", "stage": "silence", "error": "no memory"})
    assert found == {"status": "ok", "stage": "silence", "silence_note": "no memory"}


def test_page_without_rows() -> None:
    assert "0 of 0 models merged" in page({}, "on paper")
    assert "\non paper\n" in page({}, "on paper")
