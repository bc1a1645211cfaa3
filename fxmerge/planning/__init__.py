"""Decides how many channels each group keeps, which ones, and how these represent the others.

scope         the groups that the options allow, and plans that are replayed
channel_ops   what the nodes between a producer and a consumer do to each channel
statistics    the similarity of a group's channels, from weights and norms or from data
counts        how many channels a group keeps for a given ratio
roles         groups that keep equally many channels, if asked for
counted       what a budget counts, in all modules or in some of them
price         the cost of a model for given numbers of channels, without building it
error_curves  the error of a group as a function of the number of channels kept
room          the groups that a budget is divided among, and what each width of them costs and loses
budget        the numbers of channels that meet a budget
draft         the merged graph of a choice of channels, before refit
decompose     the decomposition of a group, and what each consumer absorbs
components    the principal components of a group whose paths are linear
selecting     which channels a group keeps, or that it keeps components
candidates    the candidates of a group: what selectors choose the kept channels by
"""
