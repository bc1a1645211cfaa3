"""Analyses a captured graph: which channels can be merged, and what else changes when they are.

propagate        the labels of channels, propagated through the graph by the rules
whole_blocks     blocks of channels that are removed whole, such as attention heads
groups           labels, joined into atoms and merge groups
members          the layers of a group, and the places of its channels in each of them
grouping         the groups for given options, limited to those that can be cut out of the graph
literal_sizes    literal sizes in calls, recomputed for the channels that are kept
attentions       the attentions, and what each stores of a token in a key-value cache
untouched        the parameters that no layer of the graph holds channels with, and why
feasible         the numbers of channels that a group can keep
constants        constants that follow the channels that they meet: `torch.zeros(b, 16, h, w)`, `x.new_full(x.shape, 0
group_graph      the networkx graph of merge groups, layers and refusals
kept_values      values of a graph's nodes before and after a merge: what is left of them, and whether two of them are
meetings         meetings: where the outputs of a group's producers are added, multiplied or concatenated
original_values  values that a graph computes from sizes, such as the scale of attention, keep what they were before a
"""
