"""The mathematics of merging, on tensors alone, and the registries of methods that users can extend.

linalg          Gram matrices, distances, ridge regression
allocation      ALLOCATORS: how a budget is divided among groups
evidence        the records that selections and decompositions are computed from
generalisation  what a fit loses on rows that it was not fitted to
elimination     which channels can be removed at the least loss after consumers are re-solved
selection       SELECTORS: which channels are kept
decomposition   DECOMPOSITIONS: how the kept channels represent the dropped ones
components      principal components, where any matrix may mix a group's channels
by_moments      decompositions by the mean and covariance of what consumers read
probes          PROBES: the inputs that refit runs on without calibration data, with
                probe_families, probe_statistics, probe_tokens and probe_variants
least_squares   the least-squares problem that refit solves for a layer
"""
