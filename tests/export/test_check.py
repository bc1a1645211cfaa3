"""What is written is compared with the merged model: folders, exported programs, .pt2 and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.export import save
from fxmerge.export.check import Expected, bound, difference, run
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


class Functional(nn.Module):
    """Layers as functions without biases, which refit adds."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(
            [nn.Parameter(0.3 * torch.randn(12, 3, 3, 3)), nn.Parameter(0.3 * torch.randn(8, 12))]
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(F.conv2d(x, self.w[0], padding=1)).mean((2, 3))
        out: Tensor = self.head(torch.relu(F.linear(y, self.w[1])))
        return out


def refitted() -> tuple[fxmerge.Result, Tensor]:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(4, 3, 8, 8)
    return fxmerge.merge(model, x, ratio=0.5, calibration=[torch.randn(16, 3, 8, 8) for _ in range(3)]), x


@pytest.mark.slow
def test_refitted_results_are_written_as_they_are(tmp_path: Path) -> None:
    """The biases that refit adds are in every form, on inputs that no check has seen."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result, x = refitted()
    assert len(list(result.module.parameters())) > 4  # 4 in the original
    result.save(tmp_path / "o")
    result.save_program(tmp_path / "m.pt2")
    result.to_onnx(tmp_path / "m.onnx")
    unseen = torch.randn_like(x)
    with torch.no_grad():
        expected = result.module(unseen)
    torch.testing.assert_close(fxmerge.load(tmp_path / "o")(unseen), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.exported().module()(unseen), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(unseen), expected, rtol=1e-5, atol=1e-6)
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": unseen.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_graph_that_was_not_recompiled(tmp_path: Path) -> None:
    """The message names the graph module, not the model."""
    result, x = refitted()
    before = result.module(x)
    graph = result.module.graph  # type: ignore[union-attr]
    next(n for n in graph.nodes if n.target is torch.relu).target = torch.sigmoid  # type: ignore[union-attr]
    message = r"the graph of result.module was edited after its code was made.*; call result.module.recompile\(\)"
    with pytest.raises(FxMergeError, match=message):
        result.save(tmp_path / "o")
    with pytest.raises(FxMergeError, match=message):
        result.exported()
    assert not list(tmp_path.iterdir())
    result.module.recompile()  # type: ignore[operator]
    result.save(tmp_path / "o")
    after = fxmerge.load(tmp_path / "o")(x)
    torch.testing.assert_close(after, result.module(x))
    assert (after - before).abs().max() > 1e-3


def test_a_part_that_was_not_recompiled(tmp_path: Path) -> None:
    """A graph module inside a model that was recorded is found too."""
    torch.manual_seed(0)

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) if x.sum() > 1e6 else self.part(x) + 1  # type: ignore[no-any-return]

    result = plain_merge(Branching().eval(), torch.randn(3, 6), ratio=0.5)
    part: Any = result.module.part
    if not isinstance(part, torch.fx.GraphModule):
        pytest.skip("the model was not recorded")
    node = next(n for n in part.graph.nodes if "0" in str(n.target))
    with part.graph.inserting_after(node):
        twice = part.graph.call_function(torch.mul, (node, 2.0))
    node.replace_all_uses_with(twice, delete_user_cb=lambda user: user is not twice)
    with pytest.raises(FxMergeError, match=r"the graph of result.module.part was edited .* result.module.part.recomp"):
        result.save(tmp_path / "o")


def test_code_that_is_right_on_the_example_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second input finds code that returns the right outputs for the example inputs alone."""
    model, x = NETS["mlp"]()
    result = plain_merge(model, x, ratio=0.5)
    first = float(x.flatten()[0])
    real = save.source

    def special(*given: Any) -> str:
        head, _, tail = real(*given).rpartition("return self.")
        call, rest = tail.split("\n", 1)
        name = head.split("def forward(self, ")[1].split(")")[0]
        head = head.replace("    def forward(", "    def _forward(")
        return (
            (
                f"{head}return self.{call}\n\n    def forward(self, x):\n"
                f"        return self._forward(x) + 0.1 * (x.flatten()[0] - {first})\n{rest}"
            )
            if name
            else ""
        )

    monkeypatch.setattr(save, "source", special)
    result.save(tmp_path / "o")
    with pytest.raises(FxMergeError, match=r"has no model.py: its code does not reproduce the merged model's outputs"):
        fxmerge.load(tmp_path / "o")


def wrong(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    return model


def test_programs_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    bad = plain_merge(wrong(model), x, ratio=0.5).exported()
    (tmp_path / "m.pt2").write_bytes(b"old")
    save_program, export = torch.export.save, torch.export.export
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *a, **k: bad)
        with pytest.raises(FxMergeError, match=r"the exported program does not return what result.module returns"):
            result.exported()
        with pytest.raises(FxMergeError, match=r"the exported program does not return"):
            result.to_onnx(tmp_path / "m.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", lambda program, file: save_program(bad, file))
        with pytest.raises(
            FxMergeError, match=r"the program in \S*m.pt2 does not return what .*, so it is not written"
        ):
            result.save_program(tmp_path / "m.pt2")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.pt2", b"old")]
    assert torch.export.export is export
    result.save_program(tmp_path / "m.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), result.module(x))


def test_an_onnx_file_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = NETS["mlp"]()
    result = plain_merge(model, x, ratio=0.5)
    bad = torch.onnx.export(plain_merge(wrong(model), x, ratio=0.5).exported(), dynamo=True, verbose=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *a, **k: bad)
        with pytest.raises(FxMergeError, match=r"the ONNX file \S*m.onnx does not return what result.module returns"):
            result.to_onnx(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    import importlib.util

    real = importlib.util.find_spec
    result = plain_merge(*NETS["mlp"](), ratio=0.5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else real(name))
    with pytest.warns(UserWarning, match=r"m.onnx was not compared with the merged model, since onnxruntime is not"):
        result.to_onnx(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()


class Noisy(nn.Module):
    """A model whose outputs are random, and not all finite."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.a, self.b, self.noise = nn.Linear(6, 16), nn.Linear(16, 4), noise
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), 0.0, 0.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(torch.relu(self.a(x))) + self.mask
        return y + self.noise * torch.randn_like(y), y.argmax(1)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_outputs_that_are_random_or_infinite(noise: float, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    result = plain_merge(Noisy(noise).eval(), torch.randn(4, 6), ratio=0.5)
    result.save(tmp_path / "o")
    result.save_program(tmp_path / "m.pt2")
    result.to_onnx(tmp_path / "m.onnx")
    loaded = fxmerge.load(tmp_path / "o")
    x = torch.randn(5, 6)
    torch.manual_seed(1)
    expected = result.module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(loaded(x), expected)


def test_a_module_that_no_longer_takes_the_example_inputs(tmp_path: Path) -> None:
    result = plain_merge(*NETS["mlp"](), ratio=0.5)
    result.module.double()
    for write in (lambda: result.save(tmp_path / "o"), result.exported):
        with pytest.raises(FxMergeError, match=r"result.module does not run on the example inputs \(RuntimeError: "):
            write()


def test_a_run_leaves_no_trace() -> None:
    """Buffers that a forward writes, in place or anew, are as before, as are training flags and the generator."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))
            self.register_buffer("last", torch.zeros(2))
            self.register_buffer("none", None)

        def forward(self, x: Tensor) -> Tensor:
            self.last, self.none = x + self.last, x
            return self.calls.add_(1) + self.last + torch.randn(2)  # type: ignore[operator]

    module = Counting().train()
    state = torch.get_rng_state()
    one, two = (run(module, ((torch.ones(2),), {})) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(module.calls, torch.zeros(2))  # type: ignore[arg-type]
    assert torch.equal(module.last, torch.zeros(2))
    assert module.none is None
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_difference() -> None:
    """Every tensor counts, in every part of its values."""
    one = [torch.tensor([1.0, 2.0, float("inf"), float("nan")]), torch.tensor([3, 4]), torch.tensor([1 + 1j])]

    def changed(at: int, place: Any, value: Any) -> float:
        other = [t.clone() for t in one]
        other[at][place] = value
        return difference(one, other)

    assert difference(one, [t.clone() for t in one]) == 0
    assert changed(0, 1, 2.2) == pytest.approx(0.2 / 5**0.5, rel=1e-6)
    assert changed(0, 2, float("-inf")) == changed(0, 2, 5.0) == changed(0, 3, 1.0) == float("inf")
    assert changed(0, 0, float("nan")) == changed(0, 0, float("inf")) == float("inf")
    assert changed(1, 0, 5) == 0.5
    assert changed(2, 0, 1 - 1j) == pytest.approx(2 / 2**0.5)
    assert difference(one, one[:2]) == float("inf")
    assert difference(one, [one[0].double(), *one[1:]]) == float("inf")
    assert difference(one, [*one[:1], torch.tensor([[3, 4]]), one[2]]) == float("inf")
    assert difference([torch.zeros(3)], [torch.full((3,), 1e-9)]) > 1
    small = [torch.full((10,), 100.0), torch.full((10,), 1e-2)]
    assert difference(small, [small[0], 2 * small[1]]) == pytest.approx(0.1)  # against 1e-3 of the largest
    assert difference([], []) == 0
    assert (bound([torch.ones(1)]), bound([torch.ones(1, dtype=torch.bfloat16)])) == (1e-5, 3e-2)


def test_the_second_call_has_other_values() -> None:
    """Values keep their kind and range: they are in another order, or smaller if all are equal."""
    for x in (torch.randn(3, 6), torch.ones(3, 6)):
        result = plain_merge(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), x)
        expected = Expected(result.analysis.captured, result.module)
        (_, first), (((other,), _), second) = expected.calls
        assert not torch.equal(other, x)
        assert bool((other.abs() <= x.abs().max()).all())
        assert difference(first, second) > 1e-2
