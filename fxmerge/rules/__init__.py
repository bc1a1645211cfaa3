"""The rules of ops: what each op does to the labels of channels.

rule          the record of a rule
table         RULES: one row for each mathematical op, with all of its spellings
lookup        the rule of a call
context       RuleContext: what a rule sees of a call, and how it states facts
facts         the builder that collects the facts
queries       ops that return plain values: shapes, dtypes, new constants
elementwise   ops that treat every channel alike: activations, pooling, reductions
binary        ops on two operands, whose labels become equal: add, mul, where
layers        ops with parameters: linear, convolution, embedding, BatchNorm
norms         normalisations that couple channels: LayerNorm, RMSNorm, GroupNorm
contractions  sums of products of activations: matmul, attention
einsum        einsum, as contractions one after another
movement      ops that only move entries, which are run on the labels
resize        calls with literal sizes, rewritten for a narrower width
"""

from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Answer, AsKind, Module, Operand, Rule, Unknown

__all__ = ["Answer", "AsKind", "Module", "Operand", "Rule", "RuleContext", "Unknown"]
