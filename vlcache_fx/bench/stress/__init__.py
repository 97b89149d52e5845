"""Stress of the store: ``python -m vlcache_fx.bench.stress``.

Processes and threads share one store while faults are injected. With ``policy="full"`` every answer must
equal the unmodified model's; with other policies, every answer whose prompt was reused exactly. And no store
may return bytes under a key that nobody stored there.
"""
