"""benchmarks.speed.latency: the slow ops for given times, and the page for a small model."""

import re
from pathlib import Path

import pytest

from benchmarks.speed import latency


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"convolution": 8.0, "relu": 2.0}, {"convolution": 4.0, "relu": 1.0}, "-"),
        ({"convolution": 8.0, "relu": 2.0}, {"convolution": 4.0, "relu": 2.0}, "relu 1.00"),
        ({"convolution": 8.0, "relu": 2.0}, {"convolution": 6.0, "relu": 2.0}, "convolution 0.75, relu 1.00"),
        ({"linear": 8.0}, {"linear": 4.0, "attention": 1.0}, "attention (new)"),
        ({"linear": 8.0}, {"linear": 4.0, "add": 0.1}, "-"),  # negligible
    ],
)
def test_slow_ops(before: dict[str, float], after: dict[str, float], expected: str) -> None:
    assert latency.slow_ops(before, after, 0.5) == expected


def test_kernels_of_one_kind_of_op() -> None:
    ops = "mkldnn_convolution", "_slow_conv2d_forward", "_scaled_dot_product_flash_attention_for_cpu", "addmm", "relu"
    assert [latency.kind_of(op) for op in ops] == ["convolution", "convolution", "attention", "linear", "relu"]


@pytest.mark.slow
def test_page(tmp_path: Path) -> None:
    given = "--models squeezenet1_1 --image 64 --modes eager --round-to 1 8 --seconds 0.2"
    latency.main([*given.split(), "--out", str(tmp_path)])
    page = (tmp_path / "latency.md").read_text()
    rows = re.findall(r"^\| squeezenet1_1 \| (\d) \| ([\d.]+) \| ([\d.]+) \| [\d.]+% \|", page, re.M)
    assert [row[0] for row in rows] == ["1", "8"]
    assert float(rows[0][1]) == pytest.approx(2.0, rel=0.02)  # half the FLOPs
    assert all(0.5 < float(row[2]) < 4 for row in rows)
    assert "--models squeezenet1_1 --round-to 1 8 --modes eager" in page
