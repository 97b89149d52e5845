"""Models and helpers that tests, examples and benchmarks share."""
