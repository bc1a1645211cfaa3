"""What tracing could freeze: hooks, state, noise. The merged model is compared with the original on unseen inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.graph.compare import difference
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
STORE: dict[str, Tensor] = {}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.held: Any = None
        self.prepare()

    def prepare(self) -> None:
        """Hooks and closures of the subclasses."""

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))))

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + self.held)


class ByMethod(Base):
    def prepare(self) -> None:
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.held = out


class ByKeywords(Base):
    def prepare(self) -> None:
        self.a.register_forward_hook(lambda m, a, k, out: setattr(self, "held", out * 2), with_kwargs=True)


class Globally(Base):
    def prepare(self) -> None:
        self.b.register_forward_pre_hook(lambda m, args: STORE.update(b=args[0]))

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + STORE["b"])


class Only(Base):
    """A hook that takes no proxies: only a run can follow it."""

    def prepare(self) -> None:
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        if isinstance(out, Tensor):
            self.held = out


class Small(Only):
    """The frozen value is a small part of the output."""

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + 0.01 * self.held)


class Changing(Base):
    """A hook that changes what its layer returns, and one that changes what its layer reads."""

    def prepare(self) -> None:
        self.a.register_forward_hook(lambda m, args, out: out.flip(1))
        self.b.register_forward_pre_hook(lambda m, args: (args[0] * 3,))

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x))


class Overriding(Base):
    """A forward that one instance of a layer overrides."""

    def prepare(self) -> None:
        before = self.a.forward
        self.a.forward = lambda x: before(x) * torch.arange(16.0).cos()  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x))


class Closures(Base):
    def prepare(self) -> None:
        layers = [self.a, self.b]
        self.first = lambda x, layer=self.a: layer(x)
        self.second = functools.partial(lambda layer, x: layer(x), self.b)
        self.third = lambda x: layers[1](x)

    def forward(self, x: Tensor) -> Any:
        return self.o(F.relu(self.third(F.relu(self.second(F.relu(self.first(x)))))))


class Table(Base):
    """A table that is made once and depends on no value: it may be a constant."""

    def forward(self, x: Tensor) -> Any:
        if self.held is None:
            self.held = torch.linspace(0, 1, 16)
        return self.o(self.hidden(x) + self.held)


class Seeded(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return self.o(h + torch.randn(h.shape, generator=torch.Generator().manual_seed(1)))


class SeededLiteral(Base):
    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + torch.rand(16, generator=torch.Generator().manual_seed(1)))


class Stateful(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        self.held = h if self.held is None else 0.5 * (self.held + h)
        return self.o(self.held)


RIGHT = (ByMethod, ByKeywords, Globally, Only, Small, Changing, Overriding, Closures, Table, Seeded, SeededLiteral)


@pytest.mark.parametrize("made", RIGHT)
def test_is_the_original_on_inputs_never_seen(made: type[Base]) -> None:
    model, x = made().eval(), torch.randn(4, 6)
    with torch.no_grad():
        model(x)  # used once before, as any model is: what hooks keep is there
        merged = plain_merge(model, x, ratio=0.0).module
        for other in (x, torch.randn(4, 6), torch.randn(1, 6), torch.randn(7, 6)):
            assert difference([model(other)], [merged(other)]) < 1e-6


@pytest.mark.parametrize("made", [ByMethod, Only, Stateful])
def test_tensors_with_a_history_are_copied(made: type[Base]) -> None:
    """A model that was run outside of no_grad holds such tensors, which copy.deepcopy refuses."""
    model, x = made().eval(), torch.randn(4, 6)
    model(x)
    assert plain_merge(model, x).report.verdict.error < 10


@pytest.mark.parametrize("made", [ByMethod, ByKeywords, Changing, Closures])
def test_is_merged_on_the_symbolic_route(made: type[Base]) -> None:
    model, x = made().eval(), torch.randn(4, 6)
    model(x)
    result = plain_merge(model, x)
    assert result.analysis.captured.route == "symbolic"
    found = result.analysis
    assert [g.channels for g in found.groups]
    assert max(fxmerge.verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


@pytest.mark.parametrize("made", [ByMethod, Globally, Only, Closures])
def test_the_users_model_is_left_as_it_was(made: type[Base]) -> None:
    model, x = made().eval(), torch.randn(4, 6)
    expected = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain_merge(model, x)
    assert not model.training
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class OnFirstUse(Base):
    """Hooks that forward registers when it is called for the first time, as those of transformers."""

    ready = False

    def forward(self, x: Tensor) -> Any:
        if not self.ready:
            self.ready, self.kept = True, list[Tensor]()
            self.a.register_forward_hook(lambda m, args, out: self.kept.append(out))
        self.kept.clear()
        y = self.hidden(x)
        return self.o(y + torch.stack(self.kept).sum(0))


def test_hooks_of_the_first_use_are_not_left_behind() -> None:
    model, x = OnFirstUse().eval(), torch.randn(4, 6)
    plain_merge(model, x)
    assert not model.ready
    assert not model.a._forward_hooks
    assert torch.equal(model(x), OnFirstUse().eval()(x))


@pytest.mark.parametrize("used", [0, 1])
def test_state_from_call_to_call_is_the_users_own(used: int) -> None:
    """Recorded, so that it stays the user's code: it starts from the user's state, and a merge does not advance it."""
    model, x = Stateful().eval(), torch.randn(4, 6)
    with torch.no_grad():
        for _ in range(used):
            model(x)
        merged = plain_merge(model, x, ratio=0.0).module
        for _ in range(3):
            other = torch.randn(4, 6)
            assert difference([model(other)], [merged(other)]) < 1e-6


class OwnGenerator(Base):
    def prepare(self) -> None:
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + torch.randn(16, generator=self.generator))


class ManualSeed(Base):
    def forward(self, x: Tensor) -> Any:
        torch.manual_seed(0)
        return self.o(self.hidden(x) + torch.randn_like(x[:, :1]))


class Autocast(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.o(self.hidden(x))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (OwnGenerator, "two runs of OwnGenerator .* differ"),
        (ManualSeed, "seed"),
        (Autocast, "autocast"),
    ],
)
def test_what_no_graph_can_follow_is_declined(made: type[Base], message: str) -> None:
    with pytest.raises(FxMergeError, match=message):
        plain_merge(made().eval(), torch.randn(4, 6))


class Noisy(Base):
    def forward(self, x: Tensor) -> Any:
        return self.o(self.hidden(x) + torch.randn_like(x[:, :1]))


class DrawsInVain(Base):
    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        return self.o(self.hidden(x))


@pytest.mark.parametrize(("made", "expected"), [(Noisy, True), (DrawsInVain, False), (Table, False)])
def test_a_random_model_is_recognized(made: type[Base], expected: bool) -> None:
    assert fxmerge.analyze(made().eval(), torch.randn(4, 6)).captured.random is expected


def test_parts_of_a_recorded_model_are_not_frozen_either() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = Only(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.part(x)
            return self.last(y) if float(y.sum()) > -1e9 else y

    model, x = Whole().eval(), torch.randn(4, 6)
    model(x)
    result = plain_merge(model, x, ratio=0.0)
    assert result.analysis.captured.route == "recorded"
    other = torch.randn(5, 6)
    assert difference([model(other)], [result.module(other)]) < 1e-6


def by_compile(model: nn.Module) -> nn.Module:
    model.b = torch.compile(model.b, backend="eager")
    return model


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "a compiled submodule": by_compile,
    "a compiled model": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda m: nn.DataParallel(by_compile(m)),
}


@pytest.mark.parametrize("name", WRAPS)
def test_wrappers_are_taken_off(name: str) -> None:
    plain, x = Closures().eval(), torch.randn(4, 6)
    result, expected = plain_merge(WRAPS[name](Closures().eval()), x), plain_merge(plain, x)
    assert list(result.module.state_dict()) == list(expected.module.state_dict())
    assert torch.equal(result.module(x), expected.module(x))


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def prepared(model: nn.Module) -> nn.Module:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model.train())


def faked(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, torch.ao.quantization.FakeQuantize())


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(prepared(model).eval(), (torch.randn(4, 6),)).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [dynamic, prepared, faked, exported])
def test_quantized_models_are_declined(how: Callable[[nn.Module], nn.Module]) -> None:
    import torch.ao.quantization

    model = how(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(FxMergeError, match="merge the model in floating point first, and quantize"):
        fxmerge.analyze(model, torch.randn(4, 6))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_can_be_quantized_is_merged() -> None:
    import torch.ao.quantization

    model = torch.ao.quantization.QuantWrapper(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert plain_merge(model.eval(), torch.randn(4, 6)).plan.groups
