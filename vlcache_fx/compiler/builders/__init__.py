"""Builders: from a captured graph and its analysis to specs, named programs and runners.

One file per part. Builders read graph nodes once per graph; their output contains no nodes, except inside
callables. The backend and the exporter import them."""
