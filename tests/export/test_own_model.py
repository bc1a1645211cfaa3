"""`result.model`: the merged model in the user's own class, whose attributes follow where its code reads widths."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from fxmerge.export.check import difference
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Attention in plain torch: its code has the width of the heads, that of all of them, and a scale made of one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.all_dim = heads, width // heads, width
        self.limit = width // heads  # the longest sequence, which happens to be as large as a head
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.limit]
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        seen = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(self.head_dim), -1) @ v
        y: Tensor = self.o(seen.transpose(1, 2).reshape(x.size(0), x.size(1), self.all_dim))
        return y


class Encoder(nn.Module):
    """A residual stream whose width is that of all heads, until both are narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.blocks = nn.ModuleList([Attention(32, 4) for _ in range(2)])
        self.head = nn.Linear(32, 5)
        randomised(self, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x[:, : block.limit] + block(x)  # type: ignore[operator, misc]
        y: Tensor = self.head(x.mean(1))
        return y

    def predict(self, tokens: Tensor) -> Tensor:
        return self(tokens).argmax(-1)  # type: ignore[no-any-return]


def encoder() -> tuple[Encoder, Tensor]:
    torch.manual_seed(0)
    return Encoder().eval(), torch.randint(0, 30, (3, 6))


def merged(**options: Any) -> tuple[Encoder, fxmerge.Result]:
    model, tokens = encoder()
    return model, fxmerge.merge(model, tokens, ratio=0.3, **options)


@pytest.mark.parametrize("options", [{"refit": "none"}, {"samples": 64}], ids=["plain", "refit"])
def test_attributes_follow_where_the_code_reads_widths(options: dict[str, Any]) -> None:
    model, result = merged(**options)
    own = result.model
    assert isinstance(own, Encoder)
    block = own.blocks[0]
    assert isinstance(block, Attention)
    assert (block.head_dim, block.all_dim, block.limit) == (6, 24, 8)
    assert own.embed.weight.size(1) != block.all_dim  # two numbers in place of one
    for shape in ((3, 6), (2, 8), (5, 11)):
        tokens = torch.randint(0, 30, shape)
        with torch.no_grad():
            assert difference([result.module(tokens)], [own(tokens)]) < 1e-5 if shape[1] <= 8 else own(tokens).shape
    assert own.predict(torch.randint(0, 30, (4, 8))).shape == (4,)
    assert sum(p.numel() for p in own.parameters()) < sum(p.numel() for p in model.parameters())


class Halves(nn.Module):
    """A split with an attribute that only another method reads, as in YOLO's C2f, and a table kept with its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.limit, self.shape, self.table = 16, 16, None, torch.empty(0)
        self.a, self.m, self.o = nn.Conv2d(3, 32, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(48, 4, 1)

    def tabled(self, x: Tensor) -> Tensor:
        if self.shape != x.shape:
            self.shape, self.table = x.shape, torch.arange(x.size(-1), dtype=x.dtype).cos()  # type: ignore[assignment]
        return x * self.table

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(list(torch.relu(self.a(x)).chunk(2, 1)))

    def by_split(self, x: Tensor) -> Tensor:
        return self.rest(list(torch.relu(self.a(x)).split((self.c, self.c), 1)))

    def rest(self, y: list[Tensor]) -> Tensor:
        return self.tabled(self.o(torch.cat([*y, torch.relu(self.m(y[-1]))], 1)))


def test_attributes_that_other_methods_read_follow() -> None:
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(2, 3, 8, 8)
    result = plain_merge(model, x, ratio=0.25)
    assert model.shape is None
    own = result.model
    assert isinstance(own, Halves)
    assert own.c == 12
    for given in (torch.randn(2, 3, 8, 8), torch.randn(1, 3, 5, 9)):
        with torch.no_grad():
            expected = own(given)
            assert difference([expected], [own.by_split(given)]) < 1e-6
    with torch.no_grad():
        assert difference([result.module(x)], [own(x)]) < 1e-5


class Listening(Halves):
    """Registers a hook when it is called for the first time, and says so in an attribute, as models of transformers."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.ready, self.seen = True, list[Tensor]()
            self.a.register_forward_hook(lambda m, args, out: self.seen.append(out))
        self.seen.clear()
        made = super().forward(x)
        return made * len(self.seen)


def test_hooks_of_the_first_use_are_registered_once() -> None:
    """Every run of the class that the search makes starts without them, and so does what is handed out."""
    torch.manual_seed(0)
    model, x = Listening().eval(), torch.randn(2, 3, 8, 8)
    result = plain_merge(model, x, ratio=0.25)
    own = result.model
    assert isinstance(own, Listening)
    assert not model.a._forward_hooks
    with torch.no_grad():
        for _ in range(2):
            assert difference([result.module(x)], [own(x)]) < 1e-5
    assert len(own.a._forward_hooks) == 1


def test_it_comes_back_as_it_was() -> None:
    """Modes, frozen parameters and hooks are those of the user's model, which is not changed."""
    model, tokens = encoder()
    model.train()
    model.blocks[1].eval()
    model.embed.weight.requires_grad_(False)
    seen: list[int] = []
    model.head.register_forward_hook(lambda m, args, out: seen.append(m.in_features))
    before = copy.deepcopy(model.state_dict())
    own = plain_merge(model, tokens, ratio=0.5).model
    assert isinstance(own, Encoder)
    assert own.training
    assert not own.blocks[1].training
    assert not own.embed.weight.requires_grad
    assert own.head.weight.requires_grad
    seen.clear()
    own(tokens)
    assert seen == [own.head.in_features]
    assert seen[0] < 32
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [b.head_dim for b in model.blocks] == [8, 8]  # type: ignore[misc]


def test_into_another_copy() -> None:
    _, result = merged(refit="none")
    other = Encoder().train()
    own = result.into(other)
    assert own is not other
    assert own.training
    tokens = torch.randint(0, 30, (3, 6))
    with torch.no_grad():
        assert difference([result.module(tokens)], [own.eval()(tokens)]) < 1e-5
    with pytest.raises(FxMergeError, match="the model is a Linear; give a Encoder, the class that was merged"):
        result.into(nn.Linear(3, 3))


class Written(nn.Module):
    """A size that is written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)).view(-1, 4, 4).transpose(1, 2).transpose(1, 2).reshape(-1, 16))
        return y


@pytest.mark.parametrize("given", [{"ratio": 0.5}, {"budget": {"params": 0.5}}])
def test_the_report_says_why_there_is_none(given: dict[str, Any]) -> None:
    model = Written().eval()
    result = plain_merge(model, torch.randn(4, 6), **given)
    assert result.plan.groups
    assert "result.model" not in result.report.text()
    assert result.model is None
    for text in (result.report.text(width=200), result.report.json()):
        assert "result.model is None: the code of Written has sizes that cannot be changed from outside" in text
        assert ("with same_widths=True" in text) is ("budget" in given)
        assert "there is one with" not in text  # no advice where nothing helps
    with pytest.raises(FxMergeError, match="the merged weights cannot be put into Written: the code of Written has"):
        result.into(Written())


def by_compile(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [by_compile, nn.DataParallel, lambda m: nn.DataParallel(by_compile(m))])
def test_wrappers_come_back(wrap: Any) -> None:
    model, tokens = encoder()
    wrapped = wrap(model)
    own = plain_merge(wrapped, tokens, ratio=0.5).model
    kinds = [type(wrapped), type(wrapped.module) if isinstance(wrapped, nn.DataParallel) else Encoder]
    assert own is not None
    assert [type(own), type(own.module) if isinstance(own, nn.DataParallel) else Encoder] == kinds
    with torch.no_grad():
        assert own(tokens).shape == model(tokens).shape


def test_a_graph_has_no_class() -> None:
    x = torch.randn(2, 4)
    program = torch.export.export(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (x,))
    result = plain_merge(program, x, ratio=0.5)
    assert result.model is None
    assert "was a graph, which has no class of its own" in result.report.text(200)


class FrozenNorm(nn.Module):
    """A BatchNorm whose buffers are reshaped and computed with at each use, as in detectors."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name, value in (("weight", torch.rand(n) + 0.5), ("bias", torch.randn(n))):
            self.register_buffer(name, value)
        self.register_buffer("running_mean", torch.randn(n))
        self.register_buffer("running_var", torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + 1e-5).rsqrt()
        y: Tensor = x * scale + (bias - mean * scale)
        return y


def test_buffers_that_are_reshaped_before_the_class_computes_with_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), FrozenNorm(12), nn.ReLU(), nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    result = plain_merge(net, x, ratio=0.5)
    assert result.model is not None
    torch.testing.assert_close(result.model(x), result.module(x))
    assert result.model.get_submodule("1").running_mean.shape == (6,)


def test_a_parametrization_with_a_number_that_is_named_as_a_width() -> None:
    torch.manual_seed(0)
    last = nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 4, 3), dim=2)  # its `dim` is an axis
    net = nn.Sequential(nn.Conv1d(3, 12, 3), nn.ReLU(), last).eval()
    x = torch.randn(2, 3, 16)
    result = plain_merge(net, x, ratio=0.5)
    assert result.model is not None
    torch.testing.assert_close(result.model(x), result.module(x))
