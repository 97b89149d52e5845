"""Fidelity: takes a model and pairs of prompts; returns how far reuse changes its answers, and profiles.

``run.py`` compares policies and budgets with the unmodified model; ``calibrate.py`` measures a profile.
The commands import this package.
"""
