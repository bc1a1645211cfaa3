"""Checks that an analysis and a merge are correct: four oracles for tests and users, and a check after every merge.

permutation     permutes the channels of each group in all of its members; the output must not change. Detects missing
                ties and wrong indices.
overcoupling    leaves one member of a group out of that permutation; the output must change. Detects superfluous
                members.
duplicate       overwrites some channels with scaled copies of others, in all members; merging by `mostsim` must then
                return the same function with fewer channels. Detects wrong absorption.
silence         zeroes the dropped channels in a copy of the user's own model; the merged model must return what this
                copy returns, on inputs that were never seen. Detects wrong slicing, and whatever tracing has frozen.
compare         runs at the end of every merge: the merged model must be its own graph, run, and return outputs of the
                original's shapes.
"""

from fxmerge.verify.by_labels import duplicate, overcoupling, permutation, permute
from fxmerge.verify.final_check import compare
from fxmerge.verify.in_double import double_precision, in_float64, whole
from fxmerge.verify.silencing import Silence, silence, silenced
from fxmerge.verify.unseen import Unseen, unseen

__all__ = [
    "Silence",
    "Unseen",
    "compare",
    "double_precision",
    "duplicate",
    "in_float64",
    "overcoupling",
    "permutation",
    "permute",
    "silence",
    "silenced",
    "unseen",
    "whole",
]
