"""benchmarks.integration: the table says yes only for what ran, and gives every other reason."""

from __future__ import annotations

import pytest

from benchmarks.integration import one_model
from benchmarks.integration.run import COLUMNS, page


def test_the_page_counts_and_gives_reasons() -> None:
    good = dict.fromkeys(COLUMNS, "yes")
    rows = {
        ("YOLO", "yolov8n"): good | {"from_pretrained": "-", "route": "export"},
        ("YOLO", "yolo11n"): good | {"ONNX": "no | kernel", "own class": "no | kernel", "from_pretrained": "-"},
        ("timm", "resnet10t"): {"error": "out of memory"},
    }
    text = page(rows)
    assert "10 of 19 are *yes* (53%)." in text  # 6, 4 and none of 7
    assert "| yolov8n | export | yes | yes | yes | - | yes | yes | yes |" in text
    assert "| yolo11n |  | (1) | yes | yes | - | yes | (1) | yes |" in text
    assert "\n1. no \\| kernel\n" in text
    assert "| resnet10t |  |" + " (1) |" * 7 in text
    assert "1. out of memory" in text


@pytest.mark.slow
def test_one_model() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    found: dict[str, str] = {}
    for finding in one_model.findings("Hugging Face", "ViTForImageClassification"):
        found |= finding
    assert found == dict.fromkeys(COLUMNS, "yes") | {"route": "export", "generate, predict": "-"}
