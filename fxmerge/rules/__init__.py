"""What each op does to the labels of channels.

rule         the form of a rule
table        RULES, one row for each op
lookup       the rule of a call
context      RuleContext, what a rule sees of a call and records facts in
facts        the builder that collects the facts
resize       new literal sizes for calls whose operands have lost channels
The rules themselves: elementwise, binary, layers, norms, contractions, einsum, movement, queries.
"""

from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Answer, AsKind, Module, Operand, Rule, Unknown

__all__ = ["Answer", "AsKind", "Module", "Operand", "Rule", "RuleContext", "Unknown"]
