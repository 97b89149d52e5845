"""Weights, settings and pictures of the models in ``vlcache_fx.testing``. NOTICE.md has their licences."""
