"""Constants of donors' differences, for those who store them and for the operator that fits them."""

BLOCK_ROWS = 128
"""Rows of ``left`` that belong to one donor, see ``ops.fit``. Each donor's rows begin at a new block."""

RIDGE = 3.0
"""Regularisation of the weights of contexts, as a multiple of the mean square of their differences.

Prompts unlike all stored ones need it: with 1, single prompts err more than with one context; with 10, others
gain less (measured on SmolLM2 and the hybrid VLM, docs/measurements-fidelity.md).
"""

LEAST_RIDGE = 1e-12
"""For donors of which no row is recomputed: their weights are 0."""
