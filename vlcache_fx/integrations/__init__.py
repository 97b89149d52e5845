"""Integrations: adds encoder caches and span hints to models of transformers, PEFT and accelerate.

``vlcache_fx.compile`` and the exporter import this package.
"""
