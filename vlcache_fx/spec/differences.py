"""Constants of donors' differences, for those who store them and for the operator that fits them."""

BLOCK_ROWS = 128
"""Rows of ``left`` that belong to one donor, see ``ops.fit``. Each donor's rows begin at a new block."""

RIDGE = 1.0
"""Regularisation of the weights of contexts, as a multiple of the mean square of their differences.

Prompts unlike all stored ones need it: with 0.01, the errors behind short prompts grow eightfold (measured on
SmolLM2, docs/measurements-fidelity.md), and others change little.
"""

LEAST_RIDGE = 1e-12
"""For donors of which no row is recomputed: their weights are 0."""
