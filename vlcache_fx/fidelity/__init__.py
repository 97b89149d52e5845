"""Does reuse change the answers? Measured against the unmodified model, and turned into profiles.

``run.py`` compares policies and budgets, ``calibrate.py`` measures the profile of a model. Both take prompts
in pairs: one that makes the donors, one that reuses them.
"""
