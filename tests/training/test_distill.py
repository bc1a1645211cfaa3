"""Training towards the original: the loss against one computed by hand, the loop against what it is to return."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxmerge
from fxmerge import FxMergeError, Result
from fxmerge.training import distillation
from fxmerge.training.mixing import mixed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made.train()
    for _ in range(20):  # running statistics that fit
        made(torch.randn(32, 3, 6, 6))
    return made.eval()


@pytest.fixture(scope="module")
def merged() -> Result:
    return fxmerge.merge(net(), batches(1, seed=1)[0][:8], ratio=0.5, refit="none")


def batches(count: int = 6, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(count)]


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart(one: nn.Module, other: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float(F.mse_loss(one(x), other(x))) for x in data)


@pytest.mark.parametrize("samples", [16, 4])
def test_the_loss_by_hand(merged: Result, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of outputs of 8 x 6 x 6 values, `samples` are compared; of the head's 5, all that there are."""
    monkeypatch.setattr(distillation, "COMPARED", samples * 8 * 6 * 6)
    x, original = batches(1)[0], merged.analysis.captured.module
    found = fxmerge.Distillation(merged, hidden=2.0).eval()(x)
    seen: dict[str, Tensor] = {}
    for name, model in (("o", net()), ("m", copy.deepcopy(merged.model))):
        assert isinstance(model, nn.Module)
        for layer in ("conv2", "head"):
            watched = model.get_submodule(layer)
            watched.register_forward_hook(lambda _, __, out, key=name + layer: seen.update({key: out}))
        with torch.no_grad():
            seen[name] = model(x)
    kept = {g.name: list(g.kept) for g in merged.plan.groups}
    before, after = seen["oconv2"][:samples, kept["conv2"]], seen["mconv2"][:samples]
    want = [(before, after), (seen["ohead"], seen["mhead"])]
    hidden = sum(((b - a) ** 2).mean() / a.var(correction=0) for a, b in want) / len(want)
    outputs = ((seen["m"] - seen["o"]) ** 2).mean() / seen["o"].var(correction=0)
    torch.testing.assert_close(found["hidden_loss"].detach(), hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["output_loss"].detach(), outputs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss"].detach(), outputs + 2 * hidden, rtol=1e-4, atol=1e-6)
    assert float(hidden) > 1e-3
    assert original is not merged.module


def test_without_an_axis_of_samples_all_channels_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = torch.randn(6, 5, 5), torch.randn(4, 5, 5)  # of an image alone: channels first
    monkeypatch.setattr(distillation, "COMPARED", 50)
    kept = torch.tensor([0, 2, 3, 5])
    error = distillation._behind(wanted, found, distillation.Tap("conv", 0, kept))
    torch.testing.assert_close(error, ((found - wanted[kept]) ** 2).mean() / wanted[kept].var(correction=0))


def test_soft_outputs_by_hand(merged: Result) -> None:
    x = batches(1)[0]
    found = fxmerge.Distillation(merged, hidden=0.0, temperature=3.0).eval()(x)
    with torch.no_grad():
        p, q = (net()(x) / 3).softmax(-1), (merged.module(x) / 3).softmax(-1)
    torch.testing.assert_close(found["loss"].detach(), 9 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)


def test_a_model_that_lost_nothing_has_no_loss() -> None:
    same = fxmerge.merge(net(), torch.randn(4, 3, 6, 6), ratio=0.0)
    assert fxmerge.Distillation(same).eval()(batches(1)[0])["loss"].item() == 0


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_outputs_come_closer_on_batches_that_were_not_trained_on(merged: Result, hidden: float) -> None:
    before, unseen = bits(merged.module), batches(4, seed=9)
    trained = fxmerge.distill(merged, batches(), epochs=12, lr=3e-3, hidden=hidden)
    assert equal(bits(merged.module), before)
    start, end = apart(net(), merged.module, unseen), apart(net(), trained.module, unseen)
    assert end < 0.3 * start
    assert trained.model is not None
    assert apart(trained.module, trained.model, unseen) < 1e-9
    assert not trained.module.training
    assert "trained towards the original for 12 epochs" in trained.report.text()


def test_what_is_saved_is_the_trained_model(merged: Result, tmp_path: Path) -> None:
    trained = fxmerge.distill(merged, batches(2))
    trained.save(tmp_path / "small")
    x = batches(1)[0]
    assert torch.equal(fxmerge.load(tmp_path / "small")(x), trained.module(x))
    assert not torch.equal(trained.module(x), merged.module(x))


def test_labels_by_a_loss_of_ones_own(merged: Result) -> None:
    """Cross entropy with labels that contradict the original."""
    data = [(x, torch.full((16,), 3)) for x in batches()]
    trained = fxmerge.distill(
        merged, data, epochs=10, lr=1e-2, loss=lambda out, batch: 10 * F.cross_entropy(out, batch[1])
    )
    with torch.no_grad():
        assert float((trained.module(batches(1, seed=9)[0]).argmax(1) == 3).float().mean()) > 0.9


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.after = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.after(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.head(torch.relu(x).mean((2, 3)))


def test_a_branch_is_compared_behind_the_add_to_its_stream() -> None:
    """The branch alone may be far off: where it makes up for errors of the stream, it has to be."""
    torch.manual_seed(1)
    model, x = Residual().eval(), batches(1)[0]
    merged = fxmerge.merge(model, x, keep={"conv1": 0.5, "*": 1.0}, refit="none")
    seen: list[Tensor] = []
    assert isinstance(merged.model, nn.Module)
    for each in (model, merged.model):
        each.get_submodule("after").register_forward_hook(lambda _, __, out: seen.append(out))
        with torch.no_grad():
            each(x)
    assert seen[0].shape == seen[1].shape
    wanted = (seen[1] - seen[0]).square().mean() / seen[0].var(correction=0)
    found = fxmerge.Distillation(merged).eval()(x)["hidden_loss"].detach()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert wanted > 1e-3


@pytest.mark.parametrize("own", [False, True])
def test_batchnorms_keep_their_running_statistics_unless_told_otherwise(merged: Result, own: bool) -> None:
    trained = fxmerge.distill(merged, batches(), batch_statistics=own)
    for name in ("bn1.running_mean", "bn1.running_var"):
        assert torch.equal(bits(trained.module)[name], bits(merged.module)[name]) != own
    distillation = fxmerge.Distillation(merged, batch_statistics=own).train()
    x = batches(1)[0]
    with torch.no_grad():
        outputs, evaluated = distillation(x)["outputs"], merged.module(x)
    assert torch.allclose(outputs, evaluated, atol=1e-5) != own


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_compiled_models_are_trained_to_the_same_weights(
    merged: Result, hidden: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default backend needs a C++ compiler and a minute; another is given here, and what it is given is counted."""
    given: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        given.append(len(graph.graph.nodes))
        return graph.forward

    plain = fxmerge.distill(merged, batches(), hidden=hidden)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = fxmerge.distill(merged, batches(), hidden=hidden, compile=True)
    assert len(given) >= 2  # the original and the merged model
    for name, value in bits(plain.module).items():
        torch.testing.assert_close(bits(compiled.module)[name], value, rtol=1e-4, atol=1e-6)
    assert not equal(bits(compiled.module), bits(merged.module))
    assert compiled.module(batches(1)[0]).shape == (16, 5)


def test_means_of_two_samples() -> None:
    """One-hot samples show of which two a mean consists, and with which weights."""
    torch.manual_seed(0)
    n, scale = 40, torch.tensor([2.0])
    first, second, same, number = mixed([torch.eye(n), torch.eye(n).reshape(n, 2, n // 2) * 3, scale, 5])
    torch.testing.assert_close(second.reshape(n, n), first * 3)
    assert same is scale and number == 5
    torch.testing.assert_close(first.sum(1), torch.ones(n))
    assert first.min() >= 0 and int((first > 0).sum(1).max()) == 2
    own = first.diagonal()
    assert own.min() < 0.2 and own[own < 1].max() > 0.8
    partners = (first - torch.diag(own)).sum(0) > 0
    assert int(partners.sum()) > n - 5  # nearly every sample is somebody's partner, once


def test_training_on_means_brings_outputs_closer_between_samples(merged: Result) -> None:
    unseen = [(a + b) / 2 for a, b in zip(batches(4, seed=9), batches(4, seed=10), strict=True)]
    trained = fxmerge.distill(merged, batches(), epochs=12, lr=3e-3, mix=True)
    assert apart(net(), trained.module, unseen) < 0.3 * apart(net(), merged.module, unseen)
    assert not equal(bits(trained.module), bits(fxmerge.distill(merged, batches(), epochs=12, lr=3e-3).module))


def test_means_of_token_ids_and_of_labels_are_refused(merged: Result) -> None:
    with pytest.raises(FxMergeError, match=r"mix needs inputs that are floating-point tensors; one is torch\.int64"):
        mixed([torch.randn(4, 3), torch.zeros(4, 7, dtype=torch.int64)])
    with pytest.raises(FxMergeError, match="means of two samples, whose labels loss does not know"):
        fxmerge.distill(merged, batches(1), mix=True, loss=lambda out, batch: out.mean())


class StoppedError(RuntimeError):
    pass


class Batches:
    """Shuffled batches, as a DataLoader gives them, which stop once in a given epoch."""

    def __init__(self, stops: int | None = None) -> None:
        self.data, self.epoch, self.stops = batches(), 0, stops

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        self.epoch += 1
        for place, index in enumerate(torch.randperm(len(self.data)).tolist()):
            if self.epoch == self.stops and place == 3:
                raise StoppedError
            yield self.data[index]


@pytest.mark.parametrize(
    "more",
    [{}, {"ema": 0.9}, {"held_out": batches(2, seed=9)}, {"mix": True}],
    ids=["plain", "ema", "held out", "mix"],
)
def test_interrupted_and_resumed_it_ends_with_the_same_weights(merged: Result, tmp_path: Path, more: Any) -> None:
    def run(data: Batches, name: str) -> Result:
        return fxmerge.distill(merged, data, epochs=4, checkpoint=tmp_path / name, **more)

    whole = run(Batches(), "whole.safetensors")
    with pytest.raises(StoppedError):
        run(Batches(stops=3), "part.safetensors")
    resumed = run(Batches(), "part.safetensors")
    assert equal(bits(resumed.module), bits(whole.module))
    assert {p.name for p in tmp_path.iterdir()} == {"whole.safetensors", "part.safetensors"}


def test_on_held_out_batches_it_does_not_end_below_the_start(merged: Result) -> None:
    held = batches(3, seed=9)
    ruined = fxmerge.distill(merged, batches(), epochs=2, lr=100.0)
    assert apart(net(), ruined.module, held) > apart(net(), merged.module, held)
    guarded = fxmerge.distill(merged, batches(), epochs=3, lr=100.0, held_out=held, patience=1)
    assert apart(net(), guarded.module, held) <= apart(net(), merged.module, held)
    assert "for 1 epoch:" in guarded.report.text()


def test_an_exported_model_is_trained_in_evaluation_mode() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(6, 16), nn.Linear(16, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
            return {"y": self.b(self.drop(torch.relu(self.a(x)))), "z": x * (1 if scale is None else scale)}

    torch.manual_seed(0)
    x = torch.randn(64, 6)
    program = torch.export.export(Gate().eval(), (x,))
    result = fxmerge.merge(program, ratio=0.5, refit="none")
    trained = fxmerge.distill(result, x.split(64), epochs=60, lr=1e-2)
    start, end = result.report.verdict.error, trained.report.verdict.error
    wanted, found = program.module()(x)["y"], trained.module(x)["y"]
    assert ((found - wanted).norm() / wanted.norm()).item() == pytest.approx(end, rel=1e-3)
    assert end < 0.8 * start


def test_in_a_loop_of_ones_own_only_the_merged_model_is_trained(merged: Result) -> None:
    distillation = fxmerge.Distillation(merged)
    assert {id(p) for p in distillation.parameters()} == {id(p) for p in distillation.student.parameters()}
    optimizer = torch.optim.SGD(distillation.parameters(), 0.05)
    original = bits(merged.analysis.captured.module)
    distillation.train()
    first = last = 0.0
    for step, x in enumerate(batches() * 4):
        loss = distillation(x=x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss), 0.0) if step == 0 else (first, float(loss))
    assert last < first
    assert equal(bits(merged.analysis.captured.module), original)
    x = batches(1)[0]
    assert torch.equal(distillation.result().module(x), distillation.eval().student(x))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs is 0; give an integer of at least 1"),
        ({"patience": 2}, "patience needs held_out"),
        ({"temperature": 0}, "temperature is 0; give a positive number, or None"),
        ({"hidden": -1.0}, "hidden is -1.0; it is a weight, at least 0"),
        ({"held_out": []}, "held_out holds no batches"),
    ],
)
def test_options_that_make_no_sense(merged: Result, options: Any, text: str) -> None:
    with pytest.raises(FxMergeError, match=text):
        fxmerge.distill(merged, batches(1), **options)


def test_batches_that_do_not_fit(merged: Result) -> None:
    with pytest.raises(FxMergeError, match="a calibration batch has"):
        fxmerge.distill(merged, [torch.randn(4, 3)])
    with pytest.raises(FxMergeError, match="a generator can be read in one epoch only"):
        fxmerge.distill(merged, (x for x in batches(1)), epochs=2)


def test_a_training_that_diverges(merged: Result) -> None:
    text = r"training diverged: the loss is (nan|inf) in epoch \d+, batch \d+; give a smaller learning rate"
    with pytest.raises(FxMergeError, match=text):
        fxmerge.distill(merged, batches(), epochs=60, optimizer=lambda weights: torch.optim.SGD(weights, lr=1e12))


def test_a_checkpoint_of_another_model(merged: Result, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    fxmerge.distill(merged, batches(1), checkpoint=path)
    other = fxmerge.merge(net(), torch.randn(4, 3, 6, 6), ratio=0.25, refit="none")
    with pytest.raises(FxMergeError, match="is of another model or another optimizer"):
        fxmerge.distill(other, batches(1), checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(FxMergeError, match="cannot read the checkpoint"):
        fxmerge.distill(merged, batches(1), checkpoint=path)
