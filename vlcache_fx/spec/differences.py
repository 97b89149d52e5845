"""Constants of donors' differences, for those who store them and for the operator that fits them."""

BLOCK_ROWS = 128
"""Rows of ``left`` that belong to one donor, see ``ops.fit``. Each donor's rows begin at a new block."""

RIDGE = 0.01
"""Regularisation of the weights of contexts, as a share of the mean square of their differences."""

LEAST_RIDGE = 1e-12
"""For donors of which no row is recomputed: their weights are 0."""
