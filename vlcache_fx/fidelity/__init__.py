"""Measurements of how reuse changes answers, against the unmodified model -> scores and profiles.

``run.py`` compares policies and budgets, ``calibrate.py`` measures a model's profile. Both use pairs of
prompts: the first records donors, the second reuses them.
"""
