"""``vlcache serve``: an OpenAI-compatible server for compiled models, on the serving classes of transformers.

Needs the extra ``serve``; ``vlcache_fx.serve.extra.require_serve`` says so where it is missing.
"""
