"""Random nets of ops from the rule table: no tie is missing, no merge fails, and every absorption is exact.

The examples are the same in every run. The code of a failing net is printed.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, note, settings

from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.random_checks import check
from tests.helpers.random_nets import HEAD, made, sources

pytestmark = pytest.mark.usefixtures("one_thread")

stable = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


@stable
@given(sources())
def test_random_nets(source: str) -> None:
    note(source)
    check(source)


@pytest.mark.slow
@settings(stable, max_examples=100)
@given(sources())
def test_more_random_nets(source: str) -> None:
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
    model, inputs = made(source)
    result = plain_merge(model, inputs, ratio=0.5, decomposition=decomposition)
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
