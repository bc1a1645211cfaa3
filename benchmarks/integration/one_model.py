"""Merge one model and try what its user would do with it. This runs in its own process."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fxmerge
from benchmarks.harness.process import Finding, one_line
from benchmarks.integration.models import KINDS
from fxmerge.export.check import difference

RATIO = 0.25
YES, NONE = "yes", "-"  # NONE: there is nothing of this kind to try


class AbsentError(Exception):
    """There is nothing to try."""


def findings(kind: str, name: str) -> Iterator[Finding]:
    """For each column of the table: "yes", "-" or the reason why not."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, inputs = KINDS[kind][1](name)
    model.eval()
    result = fxmerge.merge(model, inputs, ratio=RATIO, refit="none")
    yield {"route": result.analysis.captured.route}
    trials: Mapping[str, Callable[[], None]] = {
        "own class": lambda: _own(result, model, inputs),
        "any size": lambda: _sizes(result, model, inputs, kind),
        "save, load": lambda: _saved(result, inputs),
        "from_pretrained": lambda: _pretrained(result, kind),
        "generate, predict": lambda: _methods(result, model, inputs, kind, name),
        "ONNX": lambda: _onnx(result, inputs, kind),
        "compile": lambda: _compiled(result, inputs, kind),
    }
    for column, trial in trials.items():
        try:
            trial()
            yield {column: YES}
        except AbsentError:
            yield {column: NONE}
        except Exception as error:
            yield {column: one_line(error)}


def _call(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        torch.manual_seed(0)
        made = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]


def _logits(values: list[Tensor]) -> list[Tensor]:
    return values[:1]  # a model in its own class may return a cache too


def _alike(one: list[Tensor], other: list[Tensor]) -> None:
    error = difference(_logits(one), _logits(other))
    assert error < 1e-3, f"the outputs differ by {error:.1g}"


def _own(result: fxmerge.Result, model: Any, inputs: Any) -> None:
    assert result.model is not None, result.report.later[-1]
    assert type(result.model) is type(model)
    _alike(_call(result.module, inputs), _call(result.model, inputs))


def _resized(inputs: Any, samples: int, kind: str) -> Any:
    """The inputs with another number of samples; tokens of another length, and images of another size."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = torch.cat([value] * samples)[: samples + 1]
        return value[:, :-3].contiguous() if value.dim() == 2 else value

    return {k: other(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(map(other, inputs))


def _sizes(result: fxmerge.Result, model: Any, inputs: Any, kind: str) -> None:
    if kind == "detection":
        given = ([torch.rand(3, 280, 340), torch.rand(3, 320, 300)],)
        _call(result.module, given)
        return
    for samples in (1, 3):
        given = _resized(inputs, samples, kind)
        _call(model, given)  # the original takes them
        _alike(_call(result.module, given), _call(result.model or result.module, given))


def _saved(result: fxmerge.Result, inputs: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "m")
        recorded = result.analysis.captured.route == "recorded"
        model = result.analysis.captured.model if recorded else None
        _alike(_call(result.module, inputs), _call(fxmerge.load(Path(folder) / "m", model=model), inputs))


def _pretrained(result: fxmerge.Result, kind: str) -> None:
    if kind != "Hugging Face":
        raise AbsentError
    with tempfile.TemporaryDirectory() as folder:
        result.save_pretrained(Path(folder) / "m")  # loads what it has written, and compares


def _methods(result: fxmerge.Result, model: Any, inputs: Any, kind: str, name: str) -> None:
    if kind == "Hugging Face" and model.can_generate():
        assert result.model is not None, "there is no model of its class"
        prompt = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
        result.model.generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    elif kind == "YOLO":
        import ultralytics

        yolo = ultralytics.YOLO(f"{name}.yaml")
        yolo.model = result.model
        yolo.predict(torch.rand(1, 3, 160, 128), verbose=False)
    elif kind == "detection":
        assert type(result.module) is type(model)
        assert "boxes" in result.module([torch.rand(3, 320, 320)])[0]
    else:
        raise AbsentError


def _onnx(result: fxmerge.Result, inputs: Any, kind: str) -> None:
    import onnxruntime
    from torch.export import Dim

    named = inputs if isinstance(inputs, dict) else dict(enumerate(inputs))
    free = {
        k: {0: Dim.AUTO, **({1: Dim.AUTO} if v.dim() == 2 else {})} for k, v in named.items() if isinstance(v, Tensor)
    }
    shapes: Any = free if isinstance(inputs, dict) else tuple(free.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        result.to_onnx(path, dynamic_shapes=shapes)
        session = onnxruntime.InferenceSession(str(path))
        given = _resized(inputs, 3, kind)
        values = [v.numpy() for v in (given.values() if isinstance(given, dict) else given)]
        names = [i.name for i in session.get_inputs()]
        made = session.run(None, dict(zip(names, values, strict=True)))
        _alike(_call(result.module, given), [torch.from_numpy(made[0])])


def _compiled(result: fxmerge.Result, inputs: Any, kind: str) -> None:
    """With dynamic shapes: once for all sizes. The backend is aot_eager, so that no C++ is compiled."""
    if kind == "detection":
        torch.compile(result.module, backend="aot_eager")(*inputs)
        return
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = torch.compile(result.module, backend="aot_eager", dynamic=True)
    for given in (inputs, _resized(inputs, 3, kind)):
        _alike(_call(module, given), _call(result.module, given))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{graphs} graphs were compiled for two sizes"
