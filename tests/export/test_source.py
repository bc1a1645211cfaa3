"""model.py for names that are no attributes, tensors that layers hold besides their own, dtypes, functions, operators.

Every model.py is run in a process without fxmerge, and must give the merged model's output.
"""

from __future__ import annotations

import keyword
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parents[1]
RECENT = hasattr(F, "grouped_mm")  # older versions of torch do not export all these names, or rename them


class Chain(nn.Module):
    """Three linear layers, with a function of the activations before the last; `own` holds what the function uses."""

    def __init__(self, between: Callable[[Any, Tensor], Any], **own: Any) -> None:
        super().__init__()
        self.a, self.b, self.o, self.between = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 2), between
        for name, value in own.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        y = self.between(self, torch.relu(self.b(torch.relu(self.a(x)))))
        return (self.o(y[0]), *y[1:]) if type(y) is tuple else self.o(y)


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


class Holder(nn.Module):
    """A module that holds parameters, buffers and modules under any names."""

    def __init__(self, parameters: Any = (), buffers: Any = (), modules: Any = ()) -> None:
        super().__init__()
        for name in parameters:
            self.register_parameter(name, p(8))
        for name in buffers:
            self.register_buffer(name, torch.rand(8) + 0.5)
        for name in modules:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for value in [*self._parameters.values(), *self._buffers.values()]:
            x = x * value
        for layer in self._modules.values():
            x = layer(x)  # type: ignore[misc]
        return x


def held(*names: str, also: Any = ()) -> nn.Module:
    return Chain(lambda m, x: m.h(x), h=Holder(parameters=names, buffers=also))


def shared_containers() -> nn.Module:
    """Parameters that stand in two lists and in a dict, in other orders."""
    one, two, three = p(8), p(8), p(8)
    lists = {"u": nn.ParameterList([one, two]), "v": nn.ParameterList([two, three, one])}
    odd = nn.ParameterDict({"a-b": three, "is": two})

    def between(m: Any, x: Tensor) -> Tensor:
        return (x * m.u[0] * m.v[0] * m.v[1] * m.odd["a-b"] + m.odd["is"]) * m.u[1] * m.v[2]

    return Chain(between, odd=odd, **lists)


class VectorQuantizer(nn.Module):
    """A codebook whose distances are computed from the weight of the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h, self.cb, self.d = nn.Linear(6, 16), nn.Linear(16, 8), nn.Embedding(12, 8), nn.Linear(8, 3)
        self.cb.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.h(torch.relu(self.e(x)))
        far = z.pow(2).sum(1, keepdim=True) + self.cb.weight.pow(2).sum(1) - 2 * z @ self.cb.weight.t()
        out: Tensor = self.d(self.cb(far.argmin(1)) + z)
        return out


def more_in_layers() -> nn.Module:
    """Layers that hold a parameter, a frozen one with an odd name, a buffer and a double, besides their own."""
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = Chain(
        lambda m, x: m.inner(x) * m.b.gain + getattr(m.inner[0], "to-b") * m.inner[0].mask + m.o.t, inner=inner
    )
    model.b.gain = p(8)
    inner[0].register_parameter("to-b", nn.Parameter(torch.rand(8), requires_grad=False))
    inner[0].register_buffer("mask", torch.arange(8) % 2)
    model.o.t = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    return model


class Spectrum(nn.Module):
    """A filter over the frequencies of a signal, with complex weights, and a complex layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8)), nn.Linear(8, 3)
        self.filter = nn.Parameter(torch.randn(5, 8, dtype=torch.complex64))
        self.mix = nn.Linear(8, 8, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(torch.relu(self.a(x)), dim=0, norm="ortho") * self.filter * (0.5 + 2j)
        y = torch.fft.irfft(self.mix(y), n=8, dim=0, norm="ortho")
        out: Tensor = self.b(y)
        return out


def some_in_half() -> nn.Module:
    """A norm with weights in bfloat16 and statistics in float32, a float8 scale, a layer in float64."""

    def between(m: Any, x: Tensor) -> Tensor:
        y = F.batch_norm(x, m.n.running_mean, m.n.running_var) * m.n.weight * m.s.to(x.dtype)
        return m.d(y.double()).float()

    model = Chain(between)
    model.n, model.d = nn.BatchNorm1d(8).bfloat16(), nn.Linear(8, 8).double()
    model.n.running_mean, model.n.running_var = torch.rand(8), torch.rand(8) + 0.5
    model.register_buffer("s", (torch.rand(8) + 0.5).to(torch.float8_e4m3fn))
    return model


def operators(m: Any, x: Tensor) -> Any:
    y = x // 0.25 % 3 + (x @ m.w) - -x
    mask = ~(x > 0.1) | ((x < 2) & (x >= 0)) ^ (x != 1)
    y = y * (x >= 0.5) + 2**x / (1 + abs(x)) - (3 - x) * (7 // (x + 1)) + (5 % (x + 2))
    return torch.where(mask, y, +y) * (x > -1), (1 << (x > 1).long()) >> 1


def indices(m: Any, x: Tensor) -> Any:
    y = x[:, None, ...][..., 0, :][:, :][...]
    z = torch.stack([x, y], -1)[..., -1][None][0, :, :]
    return z + x[:, [0, 1, 2, 3, 4, 5, 6, 7]], x[0:None:2, ..., ::3], x[-1], x[()], x[:, None, :, None].squeeze()


def by_keyword(m: Any, x: Tensor) -> Any:
    y = torch.clamp(input=x, min=0.1, max=3.0)
    y = torch.add(input=y, other=x, alpha=2) + torch.sum(input=x, dim=-1, keepdim=True).mul(other=0.1)
    y = F.layer_norm(input=y, normalized_shape=(8,), weight=None, bias=None, eps=1e-3)
    return F.linear(input=y, weight=m.w, bias=None) + x.unflatten(dim=-1, sizes=(4, 2)).flatten(start_dim=1, end_dim=-1)


def functions(m: Any, x: Tensor) -> Any:
    y = torch.special.expit(x) + torch.special.erf(x) + torch.special.logit(x.sigmoid(), eps=1e-6)
    norms = torch.linalg.norm(x, dim=-1, keepdim=True), torch.linalg.vector_norm(x, 3, -1), torch.linalg.matrix_norm(x)
    inverse = torch.linalg.inv(m.w + 4 * torch.eye(8, dtype=torch.float32))
    spread = torch.fft.fftshift(torch.fft.fft(x, dim=0).abs(), dim=0) + torch.fft.ifft2(torch.fft.fft2(x)).real
    return torch.linalg.multi_dot([y, inverse, m.w]) + spread + torch.special.log1p(x), *norms


def dtypes(m: Any, x: Tensor) -> Any:
    y = x.to(torch.bfloat16).to(torch.float8_e5m2).to(dtype=torch.float32) + x.to(torch.float16).float()
    z = torch.ones(8, dtype=torch.complex64) * complex(1, float("inf")) if False else torch.full((8,), 1 - 2j)
    return y + z.real + (x.to(torch.complex64) * (-2j)).imag + x.to(torch.cdouble).abs().float() + float("1e-300")


def odd_root() -> nn.Module:
    """A model that itself holds odd names, beside layers."""
    model = Chain(lambda m, x: x * getattr(m, "a-b") * getattr(m, "0") + getattr(m, "__c") + getattr(m, "is")(x))
    model.register_parameter("a-b", p(8))
    model.register_parameter("__c", p(8))
    model.register_buffer("0", torch.rand(8))
    model.add_module("is", nn.Linear(8, 8))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a list of parameters": lambda: Chain(lambda m, x: x * m.w[0] * m.w[1], w=nn.ParameterList([p(8), p(8)])),
    "eleven in a list": lambda: Chain(
        lambda m, x: sum(x * w for w in m.w), w=nn.ParameterList([p(8) for _ in range(11)])
    ),
    "holes in a list": lambda: Chain(lambda m, x: x * m.w[0] * m.w[2], w=nn.ParameterList([p(8), p(8), p(8)])),
    "a dict of parameters": lambda: Chain(
        lambda m, x: x * m.w["a-b"] + m.w["class"], w=nn.ParameterDict({"a-b": p(8), "class": p(8), "x": p(8)})
    ),
    "lists in a list": lambda: Chain(
        lambda m, x: x * m.w[0][0] * m.w[1]["b c"],
        w=nn.ModuleList([nn.ParameterList([p(8)]), nn.ParameterDict({"b c": p(8)})]),
    ),
    "words of Python": lambda: held("lambda", "None", "if"),
    "words and a buffer": lambda: held("lambda", "0", also=("a-b", "1", "def", "plain")),
    "dunders": lambda: held("__x", "__y__", "_z", "__w_", also=("__b", "__c__")),
    "methods of a dict": lambda: held("keys", "a-b", "items", "pop"),
    "quotes and brackets": lambda: held("it's", "f(x", "a[0]", "é", "a,b", "x y"),
    "on the model itself": odd_root,
    "odd modules": lambda: Chain(lambda m, x: m.h(x), h=Holder(modules=("0", "a-b", "lambda", "__m", "f(x"))),
    "modules named like methods": lambda: Chain(lambda m, x: m.h(x), h=Holder(modules=("values", "a-b"))),
    "one module with all": lambda: Chain(lambda m, x: m.h(x), h=Holder(("0", "in"), ("1", "is"), ("2", "__z", "as"))),
    "shared containers": shared_containers,
    "vector quantizer": VectorQuantizer,
    "norm of a weight": lambda: Chain(lambda m, x: (x, m.o.weight.norm(), m.a.weight.pow(2).mean())),
    "more in layers": more_in_layers,
    "complex": Spectrum,
    "mixed dtypes": some_in_half,
    "operators": lambda: Chain(operators, w=p(8, 8)),
    "indices": lambda: Chain(indices),
    "by keyword": lambda: Chain(by_keyword, w=p(8, 8)),
    "functions": lambda: Chain(functions, w=p(8, 8)),
    "dtypes": lambda: Chain(dtypes),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[fxmerge.Result, Path, nn.Module]]:
    """Every model merged by the plain route and by torch.export, and saved; then every model.py is run alone."""
    found = {}
    for name, make in MODELS.items():
        for route in ("traced", "exported"):
            torch.manual_seed(0)
            model, x = make().eval(), torch.randn(8, 6)
            try:
                given: Any = torch.export.export(model, (x,)) if route == "exported" else model
            except Exception:
                if RECENT:
                    raise
                continue
            if route == "exported" and any(keyword.iskeyword(k) for n in model.state_dict() for k in n.split(".")):
                if RECENT:
                    with pytest.raises(FxMergeError, match=r"modules or parameters are keywords of Python: "):
                        plain_merge(given, x)
                continue
            result = plain_merge(given, x, ratio=0.5)
            place = tmp_path_factory.mktemp("folder")
            result.save(place / "saved")
            torch.save(((x,), {}), place / "inputs.pt")
            found[f"{name}, {route}"] = result, place / "saved", model
    written = [str(f) for _, f, _ in found.values() if (f / "model.py").exists()]
    program = [sys.executable, str(TESTS / "helpers" / "saved_alone.py"), *written]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.slow
@pytest.mark.parametrize("route", ["traced", "exported"])
@pytest.mark.parametrize("name", MODELS)
def test_model_py(name: str, route: str, folders: dict[str, Any]) -> None:
    if f"{name}, {route}" not in folders:
        pytest.skip("torch writes no code for an exported program with such names")
    result, folder, model = folders[f"{name}, {route}"]
    assert result.plan.groups
    assert (folder / "model.py").exists(), fxmerge.load(folder)
    (x,), _ = torch.load(folder.parent / "inputs.pt")
    with torch.no_grad():
        expected, alone, loaded = result.module(x), torch.load(folder.parent / "outputs.pt"), fxmerge.load(folder)(x)
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loaded, expected, rtol=1e-6, atol=1e-6)
    saved = load_file(folder / "weights.safetensors")
    own = set(dict(model.named_parameters(remove_duplicate=False))) | set(dict(model.named_buffers()))
    strange = {
        k for k in saved if k not in own and not k.endswith("_folded") and "constant" not in k and "lifted" not in k
    }
    assert not strange
