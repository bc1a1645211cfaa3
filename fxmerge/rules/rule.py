"""The form of a rule: what an op does to labels.

A rule is a function `rule(ctx, *args, **kwargs)` with the signature of the op's functional form. An operand arrives as

- a `Lab`: an activation, as the labels of its channels;
- a `Param`: a parameter or buffer; or a `View`: a parameter whose elements were only moved about;
- itself, where it is a plain value: a number, a tuple, a constant tensor.

The rule returns what the op gives in the same terms, and records facts in `ctx` (see `RuleContext`): which labels must
be dropped together, which must stay, which layer has which labels. Where it cannot follow the channels it returns
`Unknown(reason)`. Then everything that the call touches stays as it is, and the facts that the rule recorded for this
call are taken back. The same holds for a rule that raises TypeError, ValueError, IndexError or RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, TypeAlias

from torch import nn

from fxmerge.ir.provenance import Kind

if TYPE_CHECKING:
    from fxmerge.rules.context import RuleContext

Operand: TypeAlias = object  # Lab, View, Param, or a plain value
Answer: TypeAlias = object  # what a rule returns: an Operand, several in a tuple or list, Unknown, or AsKind
Spelling: TypeAlias = Any  # a module class, a function, a method name, or Module(...)


@dataclass(frozen=True)
class Unknown:
    """The answer of a rule that cannot follow the channels of a call.

    reason: a clause without a subject, as in "changes the number of axes"; reports put the name of the op before it
    """

    reason: str


@dataclass(frozen=True)
class AsKind:
    """The answer of a rule for a call that is of another kind than the rule's row: `x.T` is a movement, not a query."""

    kind: Kind
    answer: Answer


@dataclass(frozen=True)
class Module:
    """A module class, and what its rule takes of a module.

    attributes:  those that it takes as arguments of the same names
    params:      does it take all parameters, as the argument `params`: {name: parameter}?
    """

    cls: type[nn.Module]
    attributes: tuple[str, ...] = ()
    params: bool = False


@dataclass(frozen=True)
class Rule:
    """One row of `RULES`: an op, its kind, what it does to labels, and every spelling of it.

    commutes: does f(s x) = s f(x) hold for every s > 0, as for ReLU, pooling and any linear map? Or a function of the
        rule's own arguments that returns it for one call. False is the safe answer.
    linear: does f(x + y) = f(x) + f(y) hold as well, with the same f for each channel and in each operand of a product
        (of a sum, in all operands together)? Then any matrix that mixes channels passes through it. False is the safe
        answer; movement needs none.
    """

    name: str
    kind: Kind
    apply: Callable[Concatenate[RuleContext, ...], Answer]
    spellings: tuple[Spelling, ...]
    commutes: bool | Callable[Concatenate[RuleContext, ...], bool] = field(default=False)
    linear: bool | Callable[Concatenate[RuleContext, ...], bool] = False
