"""The rules of ops: what each op does to the labels of channels.

rule          the record of a rule
table         RULES: one row for each mathematical op, with all of its spellings
lookup        the rule of a call
context       RuleContext: what a rule sees of a call, and how it states facts
ties          two label tensors that meet: the ties and pins that follow
call_names    what users call a layer, and what a node calls
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
indexed       ops that write to places given by an index, or read from them: setitem, scatter
over_axes     ops that reorder, accumulate or transform along an axis: sort, cumsum, fft
pointwise     further ops on operands that meet position by position: atan2, lerp, logical_and
recurrent     rules of recurrent layers: LSTM, GRU, RNN and their cells
unary         functions of one number: round, log1p, isnan
"""

from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Answer, AsKind, Module, Operand, Rule, Unknown

__all__ = ["Answer", "AsKind", "Module", "Operand", "Rule", "RuleContext", "Unknown"]
