"""Stands in for the package ``mooncake`` where a test wants a fault that the real one has only by chance."""
