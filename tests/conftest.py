"""What several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with published checkpoints, data and reference tables; a test that needs it is skipped without it."""
    folder = Path(os.environ.get("FXMERGE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder with published checkpoints and data: set FXMERGE_SHARED")
    return folder
