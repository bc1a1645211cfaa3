"""Merged models in the tools of others, compared with the merged module or with what the tool does to an own model."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fxmerge
from fxmerge.export.check import difference
from tests.helpers.language_models import llama
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
BATCH = Dim("batch")


def tokens(samples: int = 4, length: int = 9) -> dict[str, Tensor]:
    given = torch.randint(3, 60, (samples, length))
    return {"input_ids": given, "attention_mask": torch.ones_like(given)}


def small(**given: Any) -> fxmerge.Result:
    return fxmerge.merge(llama(), tokens(), ratio=0.25, samples=32, **given)


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given)["logits"]
    return found


def test_peft() -> None:
    """LoRA starts at the merged model, learns, and its merged weights compute what the adapter does."""
    peft = pytest.importorskip("peft", reason="needs peft")
    result, given = small(), tokens()
    expected = logits(result.module, given)
    before = {name: value.clone() for name, value in result.model.state_dict().items()}
    tuned = peft.get_peft_model(
        result.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assert difference([expected], [logits(tuned, given)]) < 1e-5
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = tuned(**given, labels=given["input_ids"]).loss
        losses.append(float(loss))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    learnt = logits(tuned.eval(), given)
    assert difference([expected], [learnt]) > 1e-3
    merged = tuned.merge_and_unload()
    assert difference([learnt], [logits(merged, given)]) < 1e-5
    changed = {n for n, v in merged.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if n.endswith(("q_proj.weight", "v_proj.weight"))}


def test_accelerate_dispatches(tmp_path: Path) -> None:
    """A layer on disk, read when it runs; and a model that is merged while it is dispatched."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    result, given = small(refit="none"), tokens(2, 7)
    expected = logits(result.module, given)
    wanted = result.model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
    where = {"model.layers.1": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    settings: dict[str, Any] = {"main_device": "cpu", "offload_dir": tmp_path, "force_hooks": True}
    spread = accelerate.dispatch_model(result.model, device_map=where, **settings)
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta
    assert difference([expected], [logits(spread, given)]) < 1e-6
    assert torch.equal(spread.generate(given["input_ids"], max_new_tokens=6, do_sample=False), wanted)
    hooked = accelerate.dispatch_model(small(refit="none").model, device_map={"": "cpu"}, force_hooks=True)
    again = plain_merge(hooked, tokens(), ratio=0.25)
    assert difference([logits(again.module, given)], [logits(again.model, given)]) < 1e-5


def test_lightning() -> None:
    """A LightningModule comes back as one and trains on, also after a trainer has been attached to it."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            return (self(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x = torch.randn(16, 6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3]), batch_size=4)
    model = Lit()
    for _ in range(2):
        result = fxmerge.merge(model, x, ratio=0.5)
        own = result.model
        assert type(own) is Lit
        assert own.net[0].weight.shape == (8, 6)
        with torch.no_grad():
            assert difference([result.module(x)], [own(x)]) < 1e-6
            before = (own(x) - x[:, :3]).square().mean()
        for trained in (own, model):
            trainer = lightning.Trainer(
                max_steps=8, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(trained, loader)
        with torch.no_grad():
            assert (own(x) - x[:, :3]).square().mean() < before


@pytest.fixture
def alone() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_distributed_data_parallel() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    wrapped, x = nn.parallel.DistributedDataParallel(model), torch.randn(32, 6)
    result = fxmerge.merge(wrapped, x, ratio=0.5)
    assert [name for name, _ in result.module.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(result.model, nn.parallel.DistributedDataParallel)
    assert difference([result.module(x).detach()], [result.model(x).detach()]) < 1e-6
    result.model(x).sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize("way", ["program", "onnx"])
def test_openvino(way: str, tmp_path: Path) -> None:
    """Images and sentences in other numbers and lengths than the example's."""
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    pytest.importorskip("onnxscript")
    transformers, models = pytest.importorskip("transformers"), pytest.importorskip("torchvision").models
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=300,
    )  # fmt: skip
    bert = transformers.BertForSequenceClassification(config).eval()
    resnet = randomised(models.resnet18(num_classes=10)).eval()
    free = {name: {0: BATCH, 1: Dim("length", max=300)} for name in tokens()}
    cases: list[tuple[nn.Module, Any, Any, Any]] = [
        (resnet, torch.randn(2, 3, 32, 32), ({0: BATCH},), (torch.randn(5, 3, 32, 32),)),
        (bert, tokens(), free, tuple(tokens(2, 7).values())),
    ]
    for model, example, shapes, other in cases:
        result = plain_merge(model, example, ratio=0.25, dynamic_shapes=shapes)
        with torch.no_grad():
            expected = result.module(*other)
        expected = expected if isinstance(expected, Tensor) else expected["logits"]
        source: Any = result.exported()
        if way == "onnx":
            source = tmp_path / "m.onnx"
            result.to_onnx(source)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bfloat16 on processors that have it
        compiled = openvino.compile_model(openvino.convert_model(source), "CPU", exact)
        found = torch.from_numpy(next(iter(compiled([x.numpy() for x in other]).values())))
        assert difference([expected], [found]) < 1e-4


def test_executorch(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs executorch")
    from executorch.exir import to_edge
    from executorch.runtime import Runtime

    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    result = plain_merge(net, x, ratio=0.5)
    path = tmp_path / "m.pte"
    path.write_bytes(to_edge(result.exported()).to_executorch().buffer)
    (found,) = Runtime.get().load_program(path).load_method("forward").execute([x])
    with torch.no_grad():
        assert difference([result.module(x)], [found.clone()]) < 1e-5
