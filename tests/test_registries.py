"""The five registries are open: an entry that a user adds is a choice at once, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import ALLOCATORS, DECOMPOSITIONS, PROBES, RULES, SELECTORS, FxMergeError, Options
from fxmerge.cli.main import main
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(),
                         nn.Flatten(), nn.Linear(192, 4)).eval()

example_inputs = torch.ones(2, 3, 8, 8)
"""


def net() -> nn.Module:
    names: dict[str, Any] = {}
    exec(NET, names)
    model: nn.Module = names["net"]()
    return model


# option, its registry, the entry that the user's own one calls, the other options that it takes to be called
CASES: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("selection", SELECTORS, lambda channels, count: torch.arange(count), {"refit": "none"}),
    ("decomposition", DECOMPOSITIONS, DECOMPOSITIONS["fold"], {"refit": "none"}),
    ("allocation", ALLOCATORS, ALLOCATORS["uniform"], {"refit": "none", "budget": {"flops": 0.5}}),
    ("probes", PROBES, PROBES["white"], {"samples": 16}),
]


@pytest.mark.parametrize(("option", "registry", "entry", "others"), CASES, ids=[c[0] for c in CASES])
def test_an_added_entry_is_a_choice(
    option: str, registry: dict[str, Any], entry: Any, others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FxMergeError, match=f"{option} is 'mine'; choose one of {', '.join(registry)}|auto"):
        Options(**{option: "mine"})
    calls = []

    def mine(*args: Any) -> Any:
        calls.append(args)
        return entry(*args)

    monkeypatch.setitem(registry, "mine", mine)
    options = Options(**{option: "mine"}, **others)
    result = fxmerge.merge(net(), torch.ones(2, 3, 8, 8), options)
    assert calls and result.plan.groups
    assert fxmerge.Plan.from_json(result.plan.json()).options == options
    if option == "selection":
        assert all(g.kept == tuple(range(len(g.kept))) for g in result.plan.groups)


def test_an_added_rule_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bessel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.special.bessel_j1(self.a(x)))
            return out

    x = torch.randn(2, 4)
    assert not fxmerge.analyze(Bessel(), x).groups
    monkeypatch.setitem(RULES, "mine", fxmerge.per_channel("mine", torch.special.bessel_j1, commutes=False))
    assert [g.name for g in fxmerge.analyze(Bessel(), x).groups] == ["a"]


def test_an_added_entry_is_a_choice_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NET)
    command = ["merge", f"{tmp_path}/net.py:net", "--out", f"{tmp_path}/out", "--refit", "none", "--selection", "mine"]
    assert main(command) == 2
    assert "selection is 'mine'; choose one of" in capsys.readouterr().err
    monkeypatch.setitem(SELECTORS, "mine", SELECTORS["l1"])
    assert main(command) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "repair, mine" in " ".join(capsys.readouterr().out.replace("│", " ").split())
