"""Decoders: takes a captured graph; returns layers, caches, rows, merges, outputs and what keys cover."""
