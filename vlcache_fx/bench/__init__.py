"""Measurements of time to first token, memory and answers, with and without reuse -> tables and figures."""
