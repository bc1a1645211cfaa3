"""Random nets of ops from the rule table: no tie is missing, no merge fails, and every absorption is exact.

The examples are the same in every run. The code of a failing net is printed.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan, verify
from fxmerge.graph import compare
from fxmerge.plan import GroupPlan
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.outputs import leaves
from tests.helpers.random_nets import HEAD, made, sources

pytestmark = pytest.mark.usefixtures("one_thread")

stable = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


def check(source: str) -> None:
    """Runs all oracles on one net."""
    model, x = made(source)
    same = plain_merge(model, x, ratio=0.0)
    if "MultiheadAttention" in source:  # expanded: the same sums in another order
        assert same.report.verdict.error < 1e-12
    else:
        assert same_bits(model, same.module, x)
    found = same.analysis
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    lined_up = [g.name for g in found.groups if g.partners]  # other channels can be dropped, but not permuted
    assert all(moved[name] < 1e-10 for name in lined_up), moved
    shapes = [t.shape for t in compare.outputs(model, (x,))]
    for decomposition in ("prune", "mostsim"):
        result = plain_merge(model, x, ratio=0.5, decomposition=decomposition)
        after = compare.outputs(result.module, (x,))
        assert [t.shape for t in after] == shapes
        assert all(bool(torch.isfinite(t).all()) for t in after)
        refused = {r.name for r in result.report.refusals}
        assert {p.name for p in result.plan.groups} | refused >= {g.name for g in found.groups if min_cell(g) > 1}
    if not any(g.mixers for g in found.groups):
        copied, args, kept = verify.duplicate(found.captured, found.facts, found.grouping)
        sizes = {g.name: g.channels for g in found.groups}
        plans = tuple(GroupPlan(name, sizes[name], tuple(index.tolist())) for name, index in kept.items())
        merged = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), plans), copied, args)
        assert merged.report.verdict.error < 1e-8


def min_cell(group: fxmerge.Group) -> int:
    return int(torch.bincount(group.cells).min())


def same_bits(model: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        one, two = leaves(model(x.clone())), leaves(other(x.clone()))
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@stable
@given(sources())
def test_random_nets(source: str) -> None:
    note(source)
    check(source)


FOUND = {
    "a scale that is a view of a parameter": """
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 3, 3)
        self.g = nn.Parameter(torch.zeros(12))
    def forward(self, x):
        # x: (2, 3, 8, 8)
        return self.b(self.a(x) * self.g[:, None, None])""",
    "zeros in a block": """
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(14, 12, 1, groups=2), nn.Conv2d(14, 2, 1)
    def forward(self, x):
        # x: (2, 3, 8, 8)
        y = F.pad(self.a(x), (0, 0, 0, 0, 0, 2))
        return self.b(y).mean(1), self.c(y)""",
    "a map over positions that adds a bias": """
        self.a, self.mix, self.b = nn.Linear(5, 8), nn.Linear(6, 6), nn.Linear(8, 3)
    def forward(self, x):
        # x: (2, 6, 5)
        return self.b(F.relu(self.mix(self.a(x).transpose(1, 2)).transpose(1, 2)))""",
    "a parameter that is one number": """
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.p = nn.Parameter(torch.zeros(1))
    def forward(self, x):
        # x: (2, 6, 5)
        return self.b(F.relu(self.a(x) + self.p))""",
    "a map that is added to all channels": """
        self.a, self.c, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 3, 1)
    def forward(self, x):
        # x: (2, 3, 8, 8)
        return self.b(F.relu(self.a(x) + self.c(x)))""",
    "a producer that is joined with itself by two ways": """
        self.a, self.b, self.p = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(8))
    def forward(self, x):
        # x: (2, 6, 5)
        y = self.a(x)
        return self.b(y * self.p - y)""",
    "blocks of which one is partly unread": """
        self.a, self.g = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=2)
        self.b = nn.Conv2d(7, 3, 1)
    def forward(self, x):
        # x: (2, 3, 8, 8)
        return self.b(self.g(self.a(x))[:, 1:8])""",
    "a token of its own beside the others": """
        self.a, self.b, self.t = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.zeros(1, 1, 8))
    def forward(self, x):
        # x: (2, 6, 5)
        return self.b(F.relu(torch.cat([self.t.expand(2, -1, -1), self.a(x)], 1)))""",
    "an InstanceNorm with a bias": """
        self.a, self.n, self.b = nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 3, 1)
    def forward(self, x):
        # x: (2, 3, 8, 8)
        return self.b(self.n(self.a(x)))""",
    "a norm along an axis of the image": """
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
    def forward(self, x):
        # x: (2, 3, 8, 8)
        return self.b(F.normalize(self.a(x), dim=3))""",
    "an embedding that is the head too": """
        self.e, self.b = nn.Parameter(torch.zeros(9, 8)), nn.Linear(5, 9)
    def forward(self, x):
        # x: (2, 6, 5)
        y = F.relu(torch.matmul(self.b(x).softmax(-1), self.e))
        return F.linear(y, self.e)""",
}


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("decomposition", ["lstsq", "fold"])
def test_what_random_nets_have_found(what: str, decomposition: str) -> None:
    source = HEAD.rstrip(" ") + FOUND[what].removeprefix("\n")
    check(source)
    model, x = made(source)
    result = plain_merge(model, x, ratio=0.5, decomposition=decomposition)
    assert math.isfinite(result.report.verdict.error)
    assert result.plan.groups


SOME_COPIES = """
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 16), nn.Linear(13, 3)
    def forward(self, x):
        # x: (2, 6, 5)
        y = torch.relu(self.a(x))
        return self.c((torch.cat([y, y], -1) + self.b(x))[:, :, 1:14])"""


def test_a_slice_that_takes_some_copies_of_a_channel() -> None:
    """One copy of channel 0 and another copy of channel 7 are read, so that the two are not partners."""
    check(HEAD.rstrip(" ") + SOME_COPIES.removeprefix("\n"))
