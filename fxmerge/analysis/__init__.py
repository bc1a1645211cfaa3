"""Analyses a captured graph: which channels can be merged, and what else changes when they are.

propagate      the labels of channels, propagated through the graph by the rules
whole_blocks   blocks of channels that are removed whole, such as attention heads
groups         labels, joined into atoms and merge groups
members        the layers of a group, and the places of its channels in each of them
grouping       the groups for given options, limited to those that can be cut out of the graph
literal_sizes  literal sizes in calls, recomputed for the channels that are kept
untouched      the parameters that no layer of the graph holds channels with, and why
feasible       the numbers of channels that a group can keep
"""
