"""Attention: takes nodes in any form of attention; returns the calls (sites) and what each computes."""
