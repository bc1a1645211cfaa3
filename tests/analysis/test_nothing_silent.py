"""No layer is silently left: each parameter of the user's model is in a group, or in a refusal that says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from tests.helpers.netmaking import one_thread  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.written_by_others import OTHERS, made

pytestmark = pytest.mark.usefixtures("one_thread")


def unsaid(model: nn.Module, inputs: Any) -> list[str]:
    """The parameters of a model that are in no group's layer and in no refusal with a reason."""
    found = fxmerge.analyze(model, inputs)
    members = [m.layer for g in found.groups for m in (*g.producers, *g.per_channel_params, *g.consumers)]
    told = {layer.module for layer in members} | {path for layer in members for path in layer.params.values()}
    told |= {r.name for r in found.refusals if r.reason}
    named: dict[int, list[str]] = {}
    for path, value in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(value), []).append(path.replace(".parametrizations.", "."))
    return [p[0] for p in named.values() if not any(n == t or n.startswith(f"{t}.") for n in p for t in told)]


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    assert unsaid(*NETS[name]()) == []


@pytest.mark.parametrize("name", OTHERS)
def test_nets_by_others(name: str) -> None:
    model, example, _, _ = made(name)
    assert unsaid(model, example) == []


class Batched(nn.Module):
    """What a detection model does: images are written into a batch of zeros, which nobody can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.a, self.b, self.aux = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(4, 4)

    def forward(self, images: list[Tensor]) -> Tensor:
        size = [int(max(image.shape[1:])) + int(images[0].sum() * 0) for image in images]
        batch = images[0].new_full((len(images), 3, *size[:1], *size[:1]), 0.0)
        for at, image in enumerate(images):
            batch[at, :, : image.size(1), : image.size(2)].copy_(image)
        out: Tensor = self.b(torch.relu(self.a(torch.relu(self.norm(self.stem(batch))))))
        return out


def test_a_stem_that_nobody_can_follow_is_told() -> None:
    model = Batched().eval()
    inputs = ([torch.randn(3, 9, 9)],)
    assert unsaid(model, inputs) == []
    refused = {r.name: r for r in fxmerge.analyze(model, inputs).refusals}
    assert "reads the value of a tensor" in refused["stem"].reason
    assert refused["stem"].channels == 6
    assert refused["aux"].reason == "does not run on the example inputs"


class Odd(nn.Module):
    """Layers of which none has channels that a rule knows: a recurrent one, a map over positions, a norm of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True)
        self.mix, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.bilinear, self.out = nn.Bilinear(5, 5, 3), nn.Linear(3, 2)
        self.spare = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.a(x))[0]
        y = self.norm(self.mix(y.transpose(1, 2))).transpose(1, 2)
        out: Tensor = self.out(self.bilinear(y, y))
        return out


def test_layers_without_a_rule_are_told() -> None:
    assert unsaid(Odd().eval(), torch.randn(2, 4, 3)) == []


class Tied(nn.Module):
    """One weight of three names, of which a run uses two: those of the embedding and of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.table = nn.Embedding(11, 6), nn.Embedding(11, 6)
        self.inside, self.head = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.table.weight = self.head.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.inside(self.table(x))))
        return out


def test_a_tied_weight_runs_where_one_of_its_names_does() -> None:
    model, x = Tied().eval(), torch.randint(0, 11, (2, 5))
    assert unsaid(model, x) == []
    assert [r.reason for r in fxmerge.analyze(model, x).refusals if "does not run" in r.reason] == []


def test_what_a_folded_parameter_is_made_of_runs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.idle = nn.Linear(5, 4, bias=False), nn.Linear(3, 3)
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.a.weight * self.scale.weight.sum()
            return self.b(nn.functional.linear(x, weight, self.a.bias).relu())

    found = fxmerge.analyze(Scaled().eval(), torch.randn(2, 3)).refusals
    assert {r.name: r.reason for r in found} == {
        "b": "is the model's output",
        "idle": "does not run on the example inputs",
    }


class Scaled(nn.Module):
    """CLIP's: a number that is learned scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.scale


def test_a_parameter_without_axes_is_one_channel() -> None:
    found = fxmerge.analyze(Scaled(), torch.randn(2, 4))
    (refused,) = (r for r in found.refusals if r.name == "scale")
    assert refused.channels == 1
    told = {r["name"]: r for r in json.loads(found.report.json())["refusals"]}
    assert told["scale"]["parameters"] == 1
    assert "scale" in found.report.text() and "scale" in found.report.html()


class Collecting(nn.Module):
    """Returns what the head computes, and in a list what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        read = torch.relu(self.a(x)) + self.b(x)
        score = self.head(read)
        return score, [read]


def test_each_of_several_outputs_is_told_with_its_line() -> None:
    found = fxmerge.analyze(Collecting().eval(), torch.randn(2, 4)).refusals
    lines = {r.name: (r.reason, r.where.rpartition(": ")[2]) for r in found}
    read = ("is the model's output", "read = torch.relu(self.a(x)) + self.b(x)")
    assert lines == {"a": read, "b": read, "head": (read[0], "score = self.head(read)")}
