"""A merged model can be trained like any other: gradients, modes, optimisers, state_dicts, and distributed wrappers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fxmerge
from fxmerge.graph.compare import difference, outputs
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.two_processes import run_on_two

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("residual", "dense", "encoder", "words", "mlp")


def routes(name: str, folder: Path) -> dict[str, tuple[nn.Module, Any]]:
    """The merged module, the module loaded from its saved source, and the user's class with its weights."""
    model, x = NETS[name]()
    result = plain_merge(model, x)
    result.save(folder / name)
    ways = {"module": result.module, "source": fxmerge.load(folder / name)}
    return {k: (m, x) for k, m in {**ways, "class": fxmerge.load(folder / name, model=model)}.items()}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow_to_every_parameter(name: str, tmp_path: Path) -> None:
    """The gradients match finite differences in float64."""
    for module, x in routes(name, tmp_path).values():
        module = module.double().eval()
        x = x.double() if x.is_floating_point() else x
        module(x).square().sum().backward()
        for path, parameter in module.named_parameters():
            assert parameter.grad is not None, path
            place = int(parameter.grad.abs().argmax())
            ends = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter.view(-1)[place] += step
                    ends.append(float(module(x).square().sum()))
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-6
            slope = float(parameter.grad.view(-1)[place])
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-3, abs=1e-5), path


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", NAMES)
def test_training_makes_the_loss_smaller(name: str, optimiser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for module, x in routes(name, tmp_path).values():
        module.train()
        target = torch.randn_like(module(x))
        losses = []
        steps = optimiser(module.parameters(), lr=0.003)
        for _ in range(20):
            steps.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            steps.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.95 * losses[0]


def test_train_mode_moves_the_statistics_and_eval_does_not(tmp_path: Path) -> None:
    for module, x in routes("residual", tmp_path).values():
        batch_norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
        before = batch_norm.running_mean.clone()
        module.eval()(x)
        assert torch.equal(before, batch_norm.running_mean)
        module.train()(x)
        assert not torch.equal(before, batch_norm.running_mean)
        assert not module.eval().training


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_out_and_in(name: str, tmp_path: Path) -> None:
    found = routes(name, tmp_path)
    for module, x in found.values():
        expected, fresh = outputs(module, (x,)), copy.deepcopy(module)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        assert difference(expected, outputs(fresh, (x,))) > 0.1
        fresh.load_state_dict(module.state_dict())
        assert difference(expected, outputs(fresh, (x,))) == 0
    found["source"][0].load_state_dict(found["module"][0].state_dict())
    found["class"][0].load_state_dict(found["source"][0].state_dict())


def test_a_trained_model_is_saved_as_it_is_now(tmp_path: Path) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.mul_(1.5)
    result.save(tmp_path / "o")
    for module in (fxmerge.load(tmp_path / "o"), fxmerge.load(tmp_path / "o", model=model)):
        assert difference(outputs(result.module, (x,)), outputs(module, (x,))) <= 1e-6


@pytest.mark.slow
def test_two_processes_train_it(tmp_path: Path) -> None:
    """DDP and FSDP2 in two processes give the same weights as one process with the whole batch."""
    run_on_two("distributed_training.py", tmp_path)
    module = plain_merge(*NETS["mlp"]()).module.train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    data = torch.randn(8, 12, generator=torch.Generator().manual_seed(7))
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        module(data).square().mean().backward()
        optimiser.step()
    names = ["ddp0", "ddp1"] + ["fsdp0", "fsdp1"] * hasattr(torch.cpu.Stream, "record_event")
    for name in names:
        found = load_file(tmp_path / f"{name}.safetensors")
        for key, value in module.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found[key], before[key], atol=1e-3)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    merged = plain_merge(*NETS["mlp"]()).module
    before = {k: v.clone() for k, v in merged.state_dict().items()}

    class Trained(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = merged

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss: Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 12)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Trained(), data)
    assert trainer.global_step == 4
    assert all(not torch.equal(before[k], v) for k, v in merged.state_dict().items())
