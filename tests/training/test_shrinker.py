"""Merging while training: what is handed over is the masked model, and a run can be interrupted or shared."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import FxMergeError
from tests.helpers.two_processes import run_on_two


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(seed: int, count: int = 32) -> tuple[Tensor, Tensor]:
    """Noise with a bright stripe; the label says which of four."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for stripe in range(4):
        x[label == stripe, :, 2 * stripe : 2 * stripe + 2] += 1.5 * (-1) ** stripe
    return x, label


def trained(steps: int, ready: Any = None, model: Net | None = None, begin: int = 0, **options: Any) -> Any:
    """A loop of a user, from step `begin`; (model, optimizer, shrinker)."""
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    options = {"budget": {"params": 0.5}, "steps": 40, "every": 4, **options}
    shrinker = fxmerge.Shrinker(model, data(0)[0][:4], **options)
    if ready is not None:
        ready(model, optimizer, shrinker)
    model.train()
    for step in range(begin, steps):
        x, label = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), label).backward()
        optimizer.step()
        shrinker.step()
    return model, optimizer, shrinker


def accuracy(model: nn.Module) -> float:
    x, label = data(10**6, 1000)
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(x).argmax(1) == label).float().mean())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_model_shrinks_in_a_users_loop() -> None:
    model, optimizer, shrinker = trained(40)
    whole = accuracy(model)
    small = shrinker.finish(optimizer).model
    assert type(small) is Net and small.training
    assert 0.4 < size(small) / size(net()) <= 0.505
    assert accuracy(small) > max(0.8, whole - 0.05)
    before = accuracy(small)
    for step in range(40, 60):  # it goes on with the same optimizer
        x, label = data(step)
        optimizer.zero_grad()
        F.cross_entropy(small(x), label).backward()
        optimizer.step()
    assert accuracy(small) > before - 0.05
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


def test_what_has_faded_is_what_leaves() -> None:
    """Without updates of the weights, the small model is the masked one."""
    model = net().eval()
    model(data(0)[0])
    shrinker = fxmerge.Shrinker(model, data(0)[0][:4], ratio=0.5, steps=40, every=4, decay=0.5)
    start = copy.deepcopy(model)
    for _ in range(40):
        shrinker.step()
    x = data(5)[0]
    small = shrinker.finish().model
    assert small is not None
    with torch.no_grad():
        assert float((model(x) - start(x)).abs().max()) > 1e-3
        torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_masked_channels_grow_back_with_the_weights_that_they_had() -> None:
    model = net()
    start = model.conv1.weight.detach().clone()
    shrinker = fxmerge.Shrinker(model, data(0)[0][:4], ratio=0.5, steps=100, every=2, decay=1.0, regrow=1.0)
    shrinker.step()
    assert torch.equal(model.conv1.weight, start)  # at the first ranking, all of the masked ones grow at once
    shrinker = fxmerge.Shrinker(model, data(0)[0][:4], ratio=0.5, steps=100, every=2, decay=1.0, regrow=0.5)
    zero, seen = [], []
    for _ in range(60):
        shrinker.step()
        rows = (model.conv1.weight == 0).all((1, 2, 3))
        zero.append(rows)
        seen.append(bool((model.conv1.weight[~rows] == start[~rows]).all()))
    assert all(seen)
    back = [bool((a & ~b).any()) for a, b in pairwise(zero)]
    assert any(back)
    assert int(zero[-1].sum()) >= 3


def test_the_state_of_the_optimizer_follows_the_channels() -> None:
    model, optimizer, shrinker = trained(40)
    momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    result = shrinker.finish(optimizer)
    kept = {g.name: list(g.kept) for g in result.plan.groups}
    one, two = kept["conv1"], kept["conv2"]
    wanted = {
        "conv1.weight": momentum["conv1.weight"][one], "bn1.bias": momentum["bn1.bias"][one],
        "conv2.weight": momentum["conv2.weight"][two][:, one], "conv2.bias": momentum["conv2.bias"][two],
        "head.weight": momentum["head.weight"][:, two], "head.bias": momentum["head.bias"],
    }  # fmt: skip
    new = dict(result.model.named_parameters())
    for name, value in wanted.items():
        assert torch.equal(optimizer.state[new[name]]["momentum_buffer"], value), name
    assert any(bool(v.any()) for v in wanted.values())


def test_interrupted_and_resumed_it_ends_with_the_same_weights() -> None:
    _, _, shrinker = trained(40)
    want = shrinker.finish().module.state_dict()
    half, optimizer, part = trained(17)
    states = copy.deepcopy((half.state_dict(), optimizer.state_dict(), part.state_dict()))

    def ready(model: Net, optimizer: Any, shrinker: Any) -> None:
        for held, state in zip((model, optimizer, shrinker), states, strict=True):
            held.load_state_dict(state)

    _, _, resumed = trained(40, ready, begin=17)
    found = resumed.finish().module.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)


def test_finished_early_it_still_meets_the_budget() -> None:
    _, optimizer, shrinker = trained(3)
    small = shrinker.finish(optimizer).model
    assert small is not None and size(small) / size(net()) <= 0.505


SCRIPT = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn import functional as F
import fxmerge
from tests.training.test_shrinker import data, net

dist.init_process_group("gloo")
rank, model = dist.get_rank(), net().eval()
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
shrinker = fxmerge.Shrinker(model, data(0)[0][:4], budget={"params": 0.5}, steps=20, every=4)
for step in range(20):
    x, label = data(step)
    optimizer.zero_grad()
    F.cross_entropy(wrapped(x[rank::2]), label[rank::2]).backward()
    optimizer.step()
    shrinker.step()
state = shrinker.finish().module.state_dict()
torch.save(state, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_end_as_one(tmp_path: Any) -> None:
    """In evaluation mode, as the BatchNorms of two processes see half of the batch each."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    run_on_two(script, tmp_path)
    model = net().eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    shrinker = fxmerge.Shrinker(model, data(0)[0][:4], budget={"params": 0.5}, steps=20, every=4)
    for step in range(20):
        x, label = data(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(x[::2]), label[::2]) / 2 + F.cross_entropy(model(x[1::2]), label[1::2]) / 2).backward()
        optimizer.step()
        shrinker.step()
    want = shrinker.finish().module.state_dict()
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for key, value in want.items():
        assert torch.equal(one[key], other[key])
        torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "steps is 0; give an integer of at least 1"),
        ({"steps": 5, "every": -1}, "every is -1; give an integer of at least 0"),
        ({"steps": 5, "decay": 2.0}, "decay is 2.0; it is a share, 0 to 1"),
        ({"steps": 5, "ratio": 0.5, "ignore": ("conv*",)}, "no group of this model can be masked while it trains"),
        ({"steps": 5, "budget": {"speed": 0.5}}, "budget has the key 'speed'"),
        ({"steps": 5, "budget": {"params": 0.5}, "depth": True}, "a Shrinker only narrows layers"),
        ({"steps": 5, "ratio": 0.5, "own_class": True}, "a Shrinker chooses channels while the model is trained"),
    ],
)
def test_options_that_make_no_sense(options: Any, text: str) -> None:
    with pytest.raises(FxMergeError, match=text):
        fxmerge.Shrinker(net(), data(0)[0], **options)
