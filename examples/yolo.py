"""Merge a YOLO of Ultralytics, and go on with it in the same object: predict, validate, train, export.

Needs `pip install fxmerge[yolo]`. The network has random weights and eight made-up images, so that nothing is
downloaded; put your own weights and data set in their place.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")

import numpy as np
import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

import fxmerge

SIZE = 64


def made_up_images(folder: Path) -> Path:
    """Eight images with a bright square each, and a data set file; returns the file's path."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(8):
        pixels = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        x, y = rng.integers(4, SIZE // 2, 2)
        pixels[y : y + 24, x : x + 24] = 220
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        (folder / "labels" / f"{i}.txt").write_text(f"0 {(x + 12) / SIZE} {(y + 12) / SIZE} {24 / SIZE} {24 / SIZE}\n")
    data = folder / "squares.yaml"
    data.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: square}}\n")
    return data


class KeepWidths(DetectionTrainer):
    """Trains the model that it is given. Ultralytics' own trainer builds a new one from the configuration."""

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        return weights


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        data = made_up_images(Path(name))
        quiet: dict[str, Any] = {"imgsz": SIZE, "verbose": False, "plots": False, "project": name, "workers": 0}
        yolo = YOLO("yolov8n.yaml")
        yolo.train(data=str(data), epochs=1, batch=4, device="cpu", **quiet)

        before = sum(p.numel() for p in yolo.model.parameters())
        result = fxmerge.merge(yolo.model, torch.rand(1, 3, SIZE, SIZE), ratio=0.3, samples=16)
        yolo.model = result.model  # a DetectionModel, as before
        print(f"parameters {before:,} -> {sum(p.numel() for p in yolo.model.parameters()):,}")

        image = Image.open(Path(name) / "images" / "0.png")
        print("predict:", type(yolo.predict(image, **quiet)[0]).__name__)
        print("val:", "mAP50" if yolo.val(data=str(data), device="cpu", **quiet).box.map50 >= 0 else "")

        widths = [p.shape for p in yolo.model.parameters()]
        yolo.ckpt = yolo.ckpt or {"model": yolo.model}
        yolo.train(data=str(data), epochs=1, batch=4, device="cpu", trainer=KeepWidths, **quiet)
        print("train: widths are kept", [p.shape for p in yolo.model.parameters()] == widths)
        print("export:", Path(yolo.export(format="onnx", imgsz=SIZE)).suffix)


if __name__ == "__main__":
    main()
