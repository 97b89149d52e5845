"""Measurements: answers with and without reuse, time to first token, and how to show both."""
