"""Benchmarks: takes a model and a preset, returns times, answers and memory, as records, tables and figures.

The commands and the examples import this package; the library does not.
"""
