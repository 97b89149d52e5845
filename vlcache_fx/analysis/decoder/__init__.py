"""A decoder's layers, caches, rows, merges and outputs, and the digest of its computation."""
