"""Merged weights in the user's own class where capture computed tensors from the class's own, before the merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fxmerge
from fxmerge import FxMergeError
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two linear layers, and what `between` computes from the hidden activations and `own`."""

    def __init__(self, between: Callable[[Any, Tensor], Any], after: Callable[[Any, Tensor], Any], **own: Any) -> None:
        super().__init__()
        self.a, self.b, self.between, self.after = nn.Linear(6, 16), nn.Linear(16, 3), between, after
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.b(self.between(self, torch.relu(self.a(x)))))


def p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def same(m: Any, x: Tensor) -> Tensor:
    return x


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)


class Pyramid(nn.Module):
    """A fusion of three branches by normalised weights, as in BiFPN, in a submodule that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = p(3)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        w = torch.softmax(self.w, 0)
        return w[0] * x + w[1] * y + w[2] * z


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 16) for _ in range(3)])
        self.fuse, self.head = Pyramid(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = (layer(x) for layer in self.layers)
        out: Tensor = self.head(torch.relu(self.fuse(self.fuse(one, two, three), two.tanh(), three)))
        return out


def normed(kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Convolutions with a computed weight, of which one is narrowed along both axes."""
    layers = [kind(nn.Conv2d(1, 8, 3)), nn.ReLU(), kind(nn.Conv2d(8, 8, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Upsample((6, 6)), *layers)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def own_parametrization(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "a temperature": lambda: Net(same, lambda m, y: y / F.softplus(m.t), t=nn.Parameter(torch.tensor(0.3))),
    "a clamped scale and a bias": lambda: Net(
        same, lambda m, y: y * m.t.exp().clamp(max=100) + m.s.sigmoid(), t=nn.Parameter(torch.tensor(2.6)), s=p(3)
    ),
    "fusion weights": Branches,
    "a scale of each channel": lambda: Net(lambda m, x: x * (1 + m.g), same, g=p(16)),
    "an exponential of each channel": lambda: Net(lambda m, x: x * m.g.exp() + m.h.neg(), same, g=p(16), h=p(16)),
    "rows times a column": lambda: Net(lambda m, x: F.linear(x, m.w * m.g), same, w=p(16, 16), g=p(16, 1)),
    "rows times a row": lambda: Net(
        lambda m, x: F.linear(x, m.w.tanh(), m.c + m.d), same, w=p(16, 16), c=p(16), d=p(16)
    ),
    "a standardised scale": lambda: Net(same, lambda m, y: y * standardised(m.w).pow(2).sum(1), w=p(3, 5)),
    "weight_norm": lambda: normed(parametrizations.weight_norm),
    "weight_norm by hooks": lambda: normed(torch.nn.utils.weight_norm),
    "spectral_norm": lambda: normed(parametrizations.spectral_norm),
    "spectral_norm by hooks": lambda: normed(torch.nn.utils.spectral_norm),
    "a parametrization of the user's": lambda: normed(own_parametrization),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a standardised weight that narrows": (
        lambda: Net(lambda m, x: F.linear(x, standardised(m.w)), same, w=p(16, 16)),
        r"the code of Net cannot take them: it computes a tensor from w at each use, which is no longer that of",
    ),
    "a norm of a weight that narrows": (
        lambda: Net(same, lambda m, y: (y, m.b.weight.norm())), r"it computes a tensor from b.weight at each use"
    ),
}  # fmt: skip


def other(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(7)
    return make().eval()


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, tmp_path: Path) -> None:
    """An instance with other weights gives the merged model's outputs, on inputs that the merge has not seen."""
    torch.manual_seed(0)
    model = TAKEN[name]().eval()
    x, unseen = torch.randn(4, 6), torch.randn(9, 6)
    before = copy.deepcopy({k: v.detach() for k, v in model.state_dict().items()})
    result = plain_merge(model, x, ratio=0.5, decomposition="prune" if "rows" in name else "mostsim")
    assert result.plan.groups
    result.save(tmp_path / "o")
    own = fxmerge.load(tmp_path / "o", model=other(TAKEN[name]))
    assert type(own) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(own(unseen), result.module(unseen), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fxmerge.load(tmp_path / "o")(unseen), result.module(unseen), rtol=1e-5, atol=1e-6)
    assert sum(t.numel() for t in own.parameters()) < sum(t.numel() for t in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())  # the original is as it was


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, message = REFUSED[name]
    model, x = make().eval(), torch.randn(4, 6)
    result = plain_merge(model, x, ratio=0.5)
    result.save(tmp_path / "o")
    with pytest.raises(FxMergeError, match=message):
        fxmerge.load(tmp_path / "o", model=other(make))
    torch.testing.assert_close(fxmerge.load(tmp_path / "o")(x), result.module(x))


def test_sources_are_kept_as_they_were(tmp_path: Path) -> None:
    """The file holds the user's own tensor under its own name; narrowed where the computed one was."""
    torch.manual_seed(0)
    model = Net(lambda m, x: x * (1 + m.g), lambda m, y: y * m.t.exp(), g=p(16), t=nn.Parameter(torch.tensor(2.6)))
    result = plain_merge(model.eval(), torch.randn(4, 6), ratio=0.5)
    result.save(tmp_path / "o")
    held = load_file(tmp_path / "o" / "weights.safetensors")
    (group,) = result.plan.groups
    assert torch.equal(held["t"], model.t)  # type: ignore[arg-type]
    assert torch.equal(held["g"], model.g[list(group.kept)])  # type: ignore[index]


def test_a_trained_result_is_not_taken_wrongly(tmp_path: Path) -> None:
    """After training, the computed tensor is no longer what the class computes from its own."""
    torch.manual_seed(0)
    model = Net(same, lambda m, y: y * m.t.exp(), t=nn.Parameter(torch.tensor(0.5)))
    result = plain_merge(model.eval(), torch.randn(4, 6), ratio=0.5)
    with torch.no_grad():
        result.module.t_folded.mul_(1.5)  # type: ignore[operator, union-attr]
    result.save(tmp_path / "o")
    with pytest.raises(FxMergeError, match=r"it computes a tensor from t at each use, which is no longer"):
        fxmerge.load(tmp_path / "o", model=model)
    x = torch.randn(5, 6)
    torch.testing.assert_close(fxmerge.load(tmp_path / "o")(x), result.module(x))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made


@pytest.mark.slow
def test_rotary_angles_that_are_in_no_state_dict(tmp_path: Path) -> None:
    """The class computes its tables from a buffer that loses entries; the class generates, token by token."""
    torch.manual_seed(0)
    model = llama()
    result = plain_merge(model, {"input_ids": torch.randint(1, 50, (2, 8))}, ratio=0.3)
    result.save(tmp_path / "o")
    own = fxmerge.load(tmp_path / "o", model=other(llama))
    assert own.model.rotary_emb.inv_freq.numel() < model.model.rotary_emb.inv_freq.numel()  # type: ignore[union-attr]
    unseen = torch.randint(1, 50, (2, 8))
    with torch.no_grad():
        expected = result.module(input_ids=unseen)
        expected = expected["logits"] if isinstance(expected, dict) else expected.logits
        torch.testing.assert_close(own(unseen).logits, expected, rtol=1e-4, atol=1e-5)
    own.generate(unseen, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
