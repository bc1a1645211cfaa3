"""Sizes that the user declares with `dynamic_shapes` vary in all that a merge returns; the others are fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxmerge
from fxmerge import FxMergeError
from fxmerge.graph.compare import difference, outputs
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


class Sentence(nn.Module):
    """Tokens and an optional mask; a branch on a size, which symbolic tracing cannot follow."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.embed, self.up, self.down = nn.Embedding(40, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.places = nn.Embedding(32, 16)
        randomised(self, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if tokens.size(1) > 31:
            return self.embed(tokens)
        x = self.embed(tokens) + (self.places.weight[:12] if self.fixed else self.places.weight[: tokens.size(1)])
        x = x + self.down(torch.relu(self.up(x)))
        return x if mask is None else x * mask[..., None].to(x.dtype)


def given(batch: int, length: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(batch + length)
    return torch.randint(40, (batch, length)), torch.ones(batch, length, dtype=torch.long)


BATCH, LENGTH = Dim("batch"), Dim("length", max=31)
FREE: dict[str, Any] = {"tokens": {0: BATCH, 1: LENGTH}, "mask": {0: BATCH, 1: LENGTH}}
SAMPLES: dict[str, Any] = {"tokens": {0: BATCH}, "mask": {0: BATCH}}


@pytest.mark.slow
@pytest.mark.parametrize("samples", [3, 1])
def test_a_size_that_is_declared_varies_in_all_forms(samples: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Sentence().eval()
    result = fxmerge.merge(model, given(samples, 12), ratio=0.0, refit="none", dynamic_shapes=FREE)
    assert result.analysis.captured.route == "export"
    result.to_onnx(tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    program = result.exported().module()
    for size in ((3, 12), (2, 31), (5, 4)):
        inputs = given(*size)
        with torch.no_grad():
            expected = model(*inputs)
        for merged in (result.module, program):
            assert difference([expected], outputs(merged, inputs)) < 1e-6, size
        names = [i.name for i in session.get_inputs()]
        (found,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        assert difference([expected], [torch.from_numpy(found)]) < 1e-5, size


@pytest.mark.slow
def test_a_size_that_is_not_declared_is_refused_by_name() -> None:
    """Without the declaration, the same model takes any length."""
    model = Sentence().eval()
    assert plain_merge(model, given(3, 12)).module(*given(3, 9)).shape == (3, 9, 16)
    for shapes in (SAMPLES, {**SAMPLES, "tokens": {0: BATCH, 1: 12}}, ({0: BATCH}, [BATCH, None])):
        result = plain_merge(model, given(3, 12), ratio=0.0, dynamic_shapes=shapes)
        inputs = given(5, 12)
        with torch.no_grad():
            assert difference([model(*inputs)], [result.module(*inputs)]) < 1e-6
        with pytest.raises(AssertionError, match=r"input tokens .*\(any, 12\)"):
            result.module(*given(3, 9))
        shape = result.exported().graph_signature
        assert shape.user_inputs == ("tokens", "mask")
        with pytest.raises((RuntimeError, AssertionError), match="12"):
            result.exported().module()(*given(3, 9))


NONSENSE: list[tuple[Any, str]] = [
    ({"token": {0: BATCH}}, r"names the input 'token', which is not given; the inputs are tokens, mask"),
    ({"tokens": {2: BATCH}}, r"axis 2 of input tokens, which has 2 axes"),
    ({"tokens": {-1: BATCH}}, r"axis -1 of input tokens"),
    ({"tokens": {0: 7}}, r"input tokens \(axis 0\) has the size 7, but in example_inputs it has 3"),
    ({"tokens": [BATCH]}, r"1 sizes for input tokens, which has 2 axes"),
    ({"tokens": BATCH}, r"dynamic_shapes\['tokens'\] is .*give \{axis: Dim\}"),
    (({0: BATCH},), r"1 entries, but 2 inputs are given: tokens, mask"),
    ("tokens", r"dynamic_shapes is a str"),
    ({"tokens": {0: "many"}}, r"dynamic_shapes does not fit the model: .*many"),
    (
        {"tokens": {0: BATCH}, "mask": {0: Dim("other")}},
        r"input mask \(axis 0\) and .*input tokens \(axis 0\) must always be equal",
    ),
    ({"tokens": {0: Dim.DYNAMIC}}, r"the model fixes input tokens \(axis 0\) at 3, but it is declared to vary"),
]


@pytest.mark.parametrize(("shapes", "message"), NONSENSE)
@pytest.mark.parametrize("call", [fxmerge.merge, fxmerge.analyze])
def test_what_does_not_fit_is_refused_by_input_and_axis(call: Any, shapes: Any, message: str) -> None:
    with pytest.raises(FxMergeError, match=message):
        call(Sentence().eval(), given(3, 12), dynamic_shapes=shapes)


@pytest.mark.parametrize("length", [LENGTH, Dim.DYNAMIC])
def test_a_size_that_the_model_fixes(length: Any) -> None:
    model = Sentence(fixed=True).eval()
    shapes = {"tokens": {0: BATCH, 1: length}, "mask": {0: BATCH, 1: length}}
    with pytest.raises(FxMergeError, match=r"fixes input tokens \(axis 1\) .*at 12, but it is declared to vary"):
        fxmerge.merge(model, given(3, 12), dynamic_shapes=shapes)
    assert plain_merge(model, given(3, 12), dynamic_shapes=SAMPLES).module(*given(5, 12)).shape == (5, 12, 16)


@pytest.mark.parametrize("most", [20, 300, 40000])
def test_a_largest_size_that_is_declared_is_the_limit(most: int) -> None:
    model = Sentence().eval()
    ten = torch.randint(40, (2, 10))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = model.embed, model.up, model.down

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) if tokens.size(1) > 2 else self.embed(tokens) + 1
            y: Tensor = self.down(torch.relu(self.up(x)))
            return y

    result = plain_merge(Plain().eval(), ten, dynamic_shapes=({1: Dim("length", min=3, max=most)},))
    assert result.analysis.captured.route == "export"
    assert result.module(torch.randint(40, (2, most))).size(1) == most
    with pytest.raises(AssertionError, match=f"at most {most}"):
        result.module(torch.randint(40, (2, most + 1)))
    assert f"{most}" in str(result.exported().range_constraints)


def test_the_report_says_where_it_has_no_effect() -> None:
    """The graph of symbolic tracing has no sizes; the exported program has those that were declared."""
    model, x = NETS["residual"]()
    result = plain_merge(model, x, dynamic_shapes=({0: BATCH},))
    assert result.analysis.captured.route == "symbolic"
    text = "dynamic_shapes holds for what is exported from the merged model, but not for the module itself"
    assert text in result.report.text(400)
    assert text in fxmerge.analyze(model, x, dynamic_shapes=({0: BATCH},)).report.text(400)
    assert text not in plain_merge(model, x).report.text(400)
    batch = torch.cat([x, x, x])
    assert difference(outputs(result.module, (batch,)), outputs(result.exported().module(), (batch,))) <= 1e-6


def test_an_exported_program_has_its_own() -> None:
    program = torch.export.export(Sentence().eval(), given(3, 12))
    for model in (program, program.module()):
        with pytest.raises(FxMergeError, match="leave out dynamic_shapes"):
            fxmerge.merge(model, given(3, 12), dynamic_shapes=SAMPLES)
