"""Layers, caches, rows, merges and outputs of a decoder, and the digest of its computation."""
