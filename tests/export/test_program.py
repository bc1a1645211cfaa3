"""ExportedPrograms as input and output, .pt2 and ONNX files, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxmerge
from fxmerge import FxMergeError
from fxmerge.cli.main import main
from fxmerge.graph.compare import difference, outputs
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")


class TwoInputs(nn.Module):
    """Inputs in containers, one passed by keyword, two outputs in a dict; both leading axes are dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, pair: list[Tensor], *, mask: Tensor) -> dict[str, Any]:
        x = torch.relu(self.b(torch.relu(self.a(pair[0] + pair[1]))))
        return {"y": self.c(x * mask[..., None]), "sizes": [x.mean((1, 2))]}


def vit() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=9).eval()
    return randomised(model), torch.randn(2, 3, 32, 32)


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    return transformers.BertModel(config).eval(), torch.randint(0, 50, (2, 8))


MODELS = {**{name: NETS[name] for name in ("residual", "dense", "encoder", "shuffle")}, "vit": vit, "bert": bert}


def program(model: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))


@pytest.mark.parametrize("name", slow_but([n for n in MODELS if n not in ("vit", "bert")], MODELS))
def test_a_program_in_and_out(name: str) -> None:
    """A dynamic batch stays dynamic, names are kept, and the program computes the same as the merged module."""
    model, x = MODELS[name]()
    given = program(model, x)
    result = plain_merge(given, ratio=0.5)
    assert result.plan.groups
    out = result.exported()
    assert out.graph_signature.user_inputs == given.graph_signature.user_inputs
    assert [(str(v.lower), str(v.upper)) for v in out.range_constraints.values()] == [("2", "64")]
    kept = set(given.state_dict) & set(out.state_dict)
    assert len(kept) > 0.9 * len(out.state_dict)
    assert sum(out.state_dict[k].numel() for k in kept) < 0.8 * sum(given.state_dict[k].numel() for k in kept)
    for batch in (torch.cat([x, x, x]), x[:2]):
        expected = outputs(result.module, (batch,))
        assert expected[0].shape[0] == len(batch)
        assert difference(expected, outputs(out.module(), (batch,))) <= 1e-6
    with pytest.raises(Exception, match=r"[Gg]uard|shape|size"):
        out.module()(torch.cat([x] * 40))


def test_inputs_in_containers_and_by_name() -> None:
    torch.manual_seed(0)
    model = TwoInputs().eval()
    x, mask = torch.randn(3, 5, 6), torch.rand(3, 5)
    batch, length = Dim("batch", max=99), Dim("length", max=50)
    dynamic = {"pair": [{0: batch, 1: length}] * 2, "mask": {0: batch, 1: length}}
    given = torch.export.export(model, ([x, 2 * x],), {"mask": mask}, dynamic_shapes=dynamic)
    result = plain_merge(given, ratio=0.5)
    assert [g.name for g in result.plan.groups] == ["a", "b"]
    out = result.exported().module()
    y, more = torch.randn(7, 9, 6), torch.rand(7, 9)
    with torch.no_grad():
        found = out([y, y], mask=more)
    assert set(found) == {"y", "sizes"}
    assert difference(outputs(result.module, ([y, y],), {"mask": more}), [found["y"], *found["sizes"]]) <= 1e-6


def test_a_model_that_came_as_a_module_is_exported_too() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x)
    fixed, free = result.exported(), result.exported({"x": {0: Dim("batch", min=2, max=9)}})
    assert not fixed.range_constraints
    batch = torch.cat([x, x])
    assert difference(outputs(result.module, (batch,)), outputs(free.module(), (batch,))) <= 1e-6
    with pytest.raises(FxMergeError, match=r"cannot export the merged model: .*pass other dynamic_shapes"):
        result.exported({"y": {0: Dim("batch")}})


def test_example_inputs_may_be_given_too() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(program(model, x), torch.cat([x, x]), ratio=0.5)
    assert len(result.analysis.captured.outputs[0]) == 2 * len(x)
    assert fxmerge.analyze(program(model, x)).groups
    replayed = fxmerge.apply(result.plan, program(model, x))
    assert difference(outputs(result.module, (x,)), outputs(replayed.module, (x,))) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, tmp_path: Path) -> None:
    """onnxruntime reproduces the merged model's outputs, also for another batch size."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = MODELS[name]()
    result = plain_merge(program(model, x), ratio=0.5)
    result.to_onnx(tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == ("input_ids" if name == "bert" else "x")
    for batch in (x, torch.cat([x, x, x])):
        found = [torch.from_numpy(v) for v in session.run(None, {given.name: batch.numpy()})]
        assert difference(outputs(result.module, (batch,)), found) <= 1e-5


def test_onnx_of_a_module(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = NETS["dense"]()
    result = plain_merge(model, x)
    result.to_onnx(tmp_path / "m.onnx", {"x": {0: Dim("batch", min=2, max=9)}})
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    batch = torch.cat([x, x])
    found = [torch.from_numpy(v) for v in session.run(None, {"x": batch.numpy()})]
    assert difference(outputs(result.module, (batch,)), found) <= 1e-5


def test_without_onnxscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = plain_merge(*NETS["mlp"]())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"needs the package onnxscript; install it with pip install 'fxmerge\[onnx\]'"
    with pytest.raises(FxMergeError, match=message):
        result.to_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Sinc(nn.Module):
    """A model with an op that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(self.b(torch.relu(self.a(x)))).real


def test_what_onnx_cannot_say(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    result = plain_merge(Sinc().eval(), torch.randn(4, 4))
    with pytest.raises(FxMergeError, match=r"torch.onnx cannot convert the merged model: ") as caught:
        result.to_onnx(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_and_writes_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x = NETS["residual"]()
    torch.export.save(program(model, x), tmp_path / "in.pt2")
    assert main(["analyze", str(tmp_path / "in.pt2"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["groups"]) > 1
    assert main(["merge", str(tmp_path / "in.pt2"), "--out", str(tmp_path / "out.pt2"), "--refit", "none"]) == 0
    assert f"written: {tmp_path}/out.pt2" in capsys.readouterr().out
    expected = plain_merge(model, x).module
    batch = torch.cat([x, x])
    given = torch.export.load(tmp_path / "out.pt2").module()
    assert difference(outputs(expected, (batch,)), outputs(given, (batch,))) <= 1e-6
    assert main(["merge", str(tmp_path / "in.pt2"), "--out", str(tmp_path / "folder"), "--refit", "none"]) == 0
    assert difference(outputs(expected, (batch,)), outputs(fxmerge.load(tmp_path / "folder"), (batch,))) <= 1e-6
    capsys.readouterr()
    assert main(["analyze", str(tmp_path / "folder"), "--shape", "2", "3", "8", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in expected.parameters())


@pytest.mark.slow
def test_the_command_line_writes_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = NETS["residual"]()
    torch.export.save(program(model, x), tmp_path / "in.pt2")
    assert main(["merge", str(tmp_path / "in.pt2"), "--out", str(tmp_path / "m.onnx"), "--refit", "none"]) == 0
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(v) for v in session.run(None, {"x": x.numpy()})]
    assert difference(outputs(plain_merge(model, x).module, (x,)), found) <= 1e-5


@pytest.mark.parametrize(("arguments", "message"), [
    (["analyze", "{dir}/none.pt2"], "the file {dir}/none.pt2 does not exist"),
    (["analyze", "{dir}/bad.pt2"], "{dir}/bad.pt2 cannot be read by torch.export.load: "),
    (["analyze", "{dir}"], "{dir} is not a folder saved by fxmerge: it has no weights.safetensors"),
    (["analyze", "{dir}/bad.pt2", "--weights", "w"], "{dir}/bad.pt2 includes its weights; leave out --weights"),
])  # fmt: skip
def test_bad_files(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"this is no archive")
    assert main([a.format(dir=tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fxmerge: " + message.format(dir=tmp_path))
    assert err.count("\n") == 1


def test_pt2_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = plain_merge(*NETS["mlp"]())
    (tmp_path / "m.pt2").write_bytes(b"old")

    def fails(*given: Any) -> None:
        Path(given[1].name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(OSError, match="no space"):
        result.save_program(tmp_path / "m.pt2")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.pt2", b"old")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compile_of_a_merged_program_is_one_graph(name: str) -> None:
    model, x = MODELS[name]()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    module = plain_merge(model, x).module
    compiled = fxmerge.compile(model, x, fxmerge.Options(refit="none"), backend=backend)
    assert difference(outputs(module, (x,)), outputs(compiled, (x,))) <= 1e-5
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["class", "a-b", "1"])
def test_names_that_are_not_names_of_python(name: str) -> None:
    """torch.export writes code with them: what it cannot write is said, with the remedy."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.ModuleDict({name: nn.Linear(6, 16)}), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.inner[name](x)))  # type: ignore[no-any-return]

    x = torch.randn(4, 6)
    result = plain_merge(Named().eval(), x, ratio=0.5)
    if name == "class":
        with pytest.raises(FxMergeError, match=r"in which class cannot stand.*give it another name"):
            result.exported()
        return
    made = result.exported()
    assert difference(outputs(result.module, (x,)), outputs(made.module(), (x,))) <= 1e-6
