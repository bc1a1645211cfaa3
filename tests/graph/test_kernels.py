"""oneDNN's gradient of strided 1x1 convolutions of few channels is not used: it writes beyond its memory on AVX2."""

from __future__ import annotations

import pytest
import torch

from fxmerge.graph.kernels import without_faults


@pytest.mark.parametrize(("shape", "stride", "faulty"), [
    ((7, 5, 1, 1), (2, 2), True), ((7, 5, 1), (1, 3)[1:], True), ((7, 5, 1, 1), (1, 1), False),
    ((7, 8, 1, 1), (2, 2), False), ((7, 5, 3, 3), (2, 2), False), ((7, 5), (), False),
])  # fmt: skip
def test_only_where_it_is_at_fault(shape: tuple[int, ...], stride: tuple[int, ...], faulty: bool) -> None:
    with without_faults([(torch.zeros(8, 8, 3, 3), (1, 1)), (torch.zeros(shape), stride)]):
        assert torch._C._get_mkldnn_enabled() != faulty
    assert torch._C._get_mkldnn_enabled()
