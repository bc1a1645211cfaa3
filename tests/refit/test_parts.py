"""Refit of models that are captured in parts: their own code runs, and each part is refitted on what reached it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.part_inputs import Declined, OwnCode
from fxmerge.calibration.sample_run import SampleRun
from fxmerge.capture.capture_model import capture
from fxmerge.errors import FxMergeError


def block(inputs: int, outputs: int, inside: int = 24) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inside, 3, padding=1), nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, outputs, 1)
    )


def images(count: int, seed: int, sizes: tuple[int, ...] = (16, 20, 24)) -> list[Tensor]:
    """Smooth images of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        side = sizes[number % len(sizes)]
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        found.append(nn.functional.interpolate(coarse, size=(side, side + 4), mode="bicubic")[0].clamp(0, 1))
    return found


class Detector(nn.Module):
    """A backbone, one head for two levels, places chosen by their scores, and a second head on what is there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone, self.level = block(3, 12), block(12, 12)
        self.scores = block(12, 1, 16)
        self.box = nn.Sequential(nn.Flatten(), nn.Linear(12 * 9, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.kind = nn.Linear(32, 4)
        settle(self)

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        found, picked = [], []
        for image in images:
            one = self.backbone((image - 0.5)[None])
            levels = [one, self.level(one)]
            for features in levels:
                scores = self.scores(features).flatten()
                if bool(scores.isnan().any()):
                    raise ValueError("no scores")
                best = scores.topk(int((scores > scores.mean()).sum())).indices[:12]
                windows = nn.functional.unfold(features, 3, padding=1)[0].T.reshape(-1, 12, 3, 3)
                found.append(self.kind(self.box(windows[best])))
                picked.append(best)
        return {"kinds": torch.cat(found), "places": torch.cat(picked)}


def settle(model: nn.Module) -> None:
    """Gives the BatchNorms the statistics of the images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for image in images(12, 7):
            model([image])
    model.eval()


class Steered(nn.Module):
    """Takes one of two paths, and adds what one part returns to what another returns in its own code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two, self.head = block(3, 8), block(8, 8), nn.Linear(8, 5)
        self.norm = nn.BatchNorm2d(8)
        self.train()
        with torch.no_grad():
            for image in images(12, 8, (16,)):
                self(image[None])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x if x.mean() > 0.2 else x + 1)
        h = (h + self.two(h)).relu()
        return self.head(self.norm(h).mean((2, 3)))


def batch(seed: int, count: int = 4) -> Tensor:
    return torch.stack(images(count, seed, (16,)))


def steps(model: nn.Module, given: list[Tensor], scores: nn.Module | None = None) -> list[Tensor]:
    """What a detector computes, on the places that `scores` (the original's) chooses."""
    found = []
    with torch.no_grad():
        for image in given:
            one = model.backbone((image - 0.5)[None])
            for features in (one, model.level(one)):
                found += [features, model.scores(features)]
                windows = nn.functional.unfold(features, 3, padding=1)[0].T.reshape(-1, 12, 3, 3)
                found.append(model.kind(model.box(windows[::5])))
    return found


def apart(original: list[Tensor], merged: list[Tensor]) -> float:
    """The mean relative error, in standard deviations of the original's."""
    errors = [float((b - a).norm() / (a - a.mean()).norm()) for a, b in zip(original, merged, strict=True)]
    return sum(errors) / len(errors)


EXAMPLE = (images(2, 1),)
HELD = images(6, 99)
SAME = {"selection": "l2", "decomposition": "prune", "samples": 32}  # what refit finds here is refit's own


@pytest.mark.slow
@pytest.mark.parametrize("data", ["example", "calibration"])
def test_refit_improves_a_detector_on_unseen_images(data: str) -> None:
    model = Detector()
    given = {"calibration": [images(2, seed) for seed in range(20, 28)]} if data == "calibration" else {}
    before = fxmerge.merge(model, EXAMPLE, ratio=0.3, **SAME, refit="none")
    after = fxmerge.merge(model, EXAMPLE, ratio=0.3, **SAME, **given)
    wanted = steps(model, HELD)
    one, other = (apart(wanted, steps(result.module, HELD)) for result in (before, after))
    assert other < 0.75 * one
    assert before.plan.groups == after.plan.groups
    assert {r.name.split(".")[0] for r in after.report.refitted if r.solved} >= {"backbone", "level", "box"}
    handed = after.report.handed_out
    assert handed is not None and handed.errors[handed.name] == min(handed.errors.values())
    assert set(after.module(HELD)) == {"kinds", "places"}


@pytest.mark.slow
@pytest.mark.parametrize("data", ["example", "calibration"])
def test_refit_improves_a_model_with_control_flow(data: str) -> None:
    model = Steered()
    given = {"calibration": [batch(seed) for seed in range(20, 28)]} if data == "calibration" else {}
    before = fxmerge.merge(model, batch(1), ratio=0.4, **SAME, refit="none")
    after = fxmerge.merge(model, batch(1), ratio=0.4, **SAME, **given)
    unseen = torch.cat([batch(90, 16), batch(91, 16) - 0.6])  # both paths
    with torch.no_grad():
        errors = [
            float((r.module(x[None]) - model(x[None])).norm()) for r in (before, after) for x in unseen
        ]
    assert sum(errors[32:]) < 0.5 * sum(errors[:32])


def reached(model: Detector, given: list[Tensor]) -> dict[str, list[Tensor]]:
    """What forward pre-hooks of the original see, by part and call."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, []).append(args[0].clone()))
        for name, part in model.named_children()
    ]
    with torch.no_grad():
        model(given)
    for hook in hooks:
        hook.remove()
    return found


def test_what_reaches_the_parts_is_what_hooks_see() -> None:
    model = Detector()
    expected = reached(model, HELD[:1])
    captured = capture(model, (images(1, 1),))
    assert captured.recorded is not None
    own = OwnCode(captured, provenance(captured))
    run = own.run((HELD[:1],), {})
    assert isinstance(run, SampleRun)
    calls = {part.path: (part.nodes, *part.again) for part in captured.recorded.parts}
    nodes = {node.name: node for node in captured.module.graph.nodes}
    seen = [(path, at, names[0]) for path in ("backbone", "box") for at, names in enumerate(calls[path])]
    assert len(seen) == 3
    for path, at, entered in seen:
        source = nodes[entered].args[0].name
        torch.testing.assert_close(run.given[source], expected[path][at], rtol=0, atol=0)
    assert own.follows == ("box",)


def test_samples_on_another_path_are_left_out() -> None:
    class Rare(Steered):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[0] % 2 == 0 else self.head(self.one(x).mean((2, 3)))

    samples = [batch(seed, 4 + seed % 2) for seed in range(20)]
    model = Rare()
    captured = capture(model, batch(1))
    own = OwnCode(captured, provenance(captured))
    assert isinstance(own.run((samples[0],), {}), SampleRun)
    other = own.run((samples[1],), {})
    assert isinstance(other, Declined) and not other.failed and "another path" in other.reason


@pytest.mark.slow
def test_refit_is_left_out_where_every_sample_takes_another_path() -> None:
    class Only(Steered):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() == batch(1).sum() else self.head(self.one(x).mean((2, 3)))

    report = fxmerge.merge(Only(), batch(1), ratio=0.4, probes="pink").report
    assert report.refitted == () and report.handed_out is None
    assert "refit is left out, as on each of" in report.text(400) and "another path" in report.text(400)


BAD: dict[str, tuple[Any, str]] = {
    "not iterable": (5, "calibration is of type int"),
    "empty": ([], "holds no batches"),
    "no images": ([[]], "a calibration batch is a list|holds no samples"),
    "numbers": ([[1, 2]], "a calibration batch has"),
    "axes": ([[torch.rand(1, 3, 4, 4, 4)]], r"has \(1, 3, 4, 4, 4\) where the example inputs have"),
    "channels": ([[torch.rand(5, 16, 16)]], "the model fails .* on a calibration batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_raise(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(FxMergeError, match=message):
        fxmerge.merge(Detector(), EXAMPLE, ratio=0.3, calibration=given)


@pytest.mark.slow
def test_a_data_loader_of_images_and_targets() -> None:
    batches = [((image,), ({"boxes": torch.rand(2, 4)},)) for image in images(4, 5)]
    result = fxmerge.merge(Detector(), EXAMPLE, ratio=0.3, calibration=batches, samples=6)
    text = result.report.text(400)
    assert "refit ran on 4 calibration samples and 2 variants of them, by the model's own code" in text
    assert "box: refit feeds both models" in text


@pytest.mark.slow
def test_as_many_samples_as_are_wanted_get_no_variants() -> None:
    result = fxmerge.merge(Detector(), EXAMPLE, ratio=0.3, calibration=[images(4, 5)], samples=4)
    assert "refit ran on 4 calibration samples, by the model's own code" in result.report.text(400)


@pytest.mark.slow
def test_same_seed_same_bits_and_the_model_stays() -> None:
    model = Detector()
    state, names = {k: v.clone() for k, v in model.state_dict().items()}, {m: set(vars(m)) for m in model.modules()}
    one, two = (fxmerge.merge(model, EXAMPLE, ratio=0.3, samples=8).module.state_dict() for _ in range(2))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {m: set(vars(m)) for m in model.modules()} == names


class Bright(nn.Module):
    """Reads the value of its input, so that the model is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too bright")
        return x


class Functional(nn.Module):
    """Calls a convolution without a bias in its own code, which cannot be given one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.check, self.one, self.two, self.head = Bright(), block(3, 16), block(16, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.train()
        with torch.no_grad():
            for seed in range(6):
                self(batch(seed, 8))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.check(x)).relu()
        h = nn.functional.conv2d(h, self.weight, padding=1).relu()
        return self.head(self.two(h).mean((2, 3)))


@pytest.mark.slow
def test_a_layer_called_by_the_users_code_gets_no_bias() -> None:
    model = Functional()
    result = fxmerge.merge(model, batch(1), ratio=0.4, samples=32)
    assert any(g.name == "one.3" for g in result.plan.groups)
    assert "weight" in {r.name for r in result.report.refitted if r.solved}
    handed, graph = result.report.handed_out, result.report.graph
    assert handed is not None and handed.name == "refitted"
    given = batch(1)
    with torch.no_grad():
        torch.testing.assert_close(result.module(given), graph(given))  # what was judged is what is handed out
