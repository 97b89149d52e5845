"""Models and helpers for tests, examples and benchmarks."""
