"""`import fxmerge` is light: it imports none of the packages that only some calls need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "scipy", "networkx", "rich", "tyro", "sympy", "torchvision", "torch.export", "torch._dynamo",
    "torch.fx.experimental", "torch.utils.flop_counter",
)  # fmt: skip


def modules_after(code: str) -> set[str]:
    """The names in sys.modules of a new process that ran this code."""
    command = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> list[str]:
    return sorted(m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY))


@pytest.fixture(scope="module")
def torch_modules() -> set[str]:
    return modules_after("import torch")


def test_import_is_light(torch_modules: set[str]) -> None:
    added = modules_after("import fxmerge") - torch_modules
    assert "fxmerge.pipeline" in added
    assert heavy(added) == []


@pytest.mark.slow
def test_the_test_sees_a_heavy_module(torch_modules: set[str]) -> None:
    assert "networkx" in heavy(modules_after("import torch, networkx") - torch_modules)


def test_help_is_light(torch_modules: set[str]) -> None:
    """The command line needs tyro, and rich to print its help."""
    help_text = "from fxmerge.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    added = {m.split(".")[0] for m in heavy(modules_after(help_text) - torch_modules)}
    assert added <= {"rich", "tyro"}


def test_the_report_of_a_merge_without_refit_imports_no_compiler() -> None:
    """torch's FLOP counter would import torch._dynamo, which takes three seconds."""
    model = "torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))"
    merge = f"import torch, fxmerge\nfxmerge.merge({model}, torch.randn(2, 3), refit='none').report.text()"
    modules = modules_after(merge)
    assert "torch.utils.flop_counter" in modules
    assert "torch._dynamo" not in modules
