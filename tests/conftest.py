"""What several test files share."""

import os
from pathlib import Path

import pytest

# One thread for each worker and each process that a test starts, before any of them imports torch: OpenMP's threads
# spin while they wait, and more of them than cores make a test of ten seconds last minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whatever ran before; torch draws a seed of its own for each process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published checkpoints, data and reference tables; a test that needs it is skipped without it."""
    folder = Path(os.environ.get("FXMERGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder with published checkpoints and data: set FXMERGE_SHARED")
    return folder
