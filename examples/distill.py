"""Train a merged model towards its original: by fxmerge.distill, and in loops of other libraries.

`fxmerge.Distillation` is a module that returns the loss. Only the merged model's parameters are its own, so that it can
be handed to accelerate, to Lightning or to the Trainer of transformers like any model. No labels are needed.
"""

import importlib.util
import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxmerge


def images(count: int, seed: int) -> Tensor:
    """Blurred noise."""
    noise = torch.randn(count, 3, 18, 18, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(noise, 3, stride=1) * 3


torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
model.train()(images(256, 0))
model.eval()

unseen = images(256, 1)


def error(module: nn.Module) -> float:
    with torch.no_grad():
        wanted = model(unseen)
        return float((module.eval()(unseen) - wanted).square().mean() / wanted.var())


batches = DataLoader(images(512, 2), batch_size=32, shuffle=True)
result = fxmerge.merge(model, images(8, 3), ratio=0.5, refit="none")
print(f"merged: error {error(result.module):.4f}")

trained = fxmerge.distill(result, batches, epochs=5, held_out=images(64, 4).split(32))
print(f"distilled: error {error(trained.module):.4f}")

distillation = fxmerge.Distillation(result)  # the same in a loop of your own
optimizer = torch.optim.AdamW(distillation.parameters(), 1e-3)
distillation.train()
for batch in batches:
    optimizer.zero_grad()
    distillation(batch)["loss"].backward()
    optimizer.step()
print(f"own loop: error {error(distillation.result().module):.4f}")

if importlib.util.find_spec("accelerate"):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    distillation = fxmerge.Distillation(result)
    optimizer = torch.optim.AdamW(distillation.parameters(), 1e-3)
    prepared, optimizer, loader = accelerator.prepare(distillation, optimizer, batches)
    prepared.train()
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(prepared(batch)["loss"])
        optimizer.step()
    print(f"accelerate: error {error(accelerator.unwrap_model(prepared).result().module):.4f}")

if importlib.util.find_spec("accelerate") and importlib.util.find_spec("transformers"):
    from transformers import Trainer, TrainingArguments

    distillation = fxmerge.Distillation(result)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=4, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
        )  # fmt: skip
        Trainer(distillation, settings, train_dataset=[{"input": x} for x in images(512, 2)]).train()
    print(f"Trainer: error {error(distillation.result().module):.4f}")

if importlib.util.find_spec("lightning"):
    import lightning

    class Towards(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.distillation = fxmerge.Distillation(result)

        def training_step(self, batch: Tensor) -> Tensor:
            return self.distillation(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.distillation.parameters(), 1e-3)

    towards = Towards()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(towards, batches)
    print(f"Lightning: error {error(towards.distillation.result().module):.4f}")
