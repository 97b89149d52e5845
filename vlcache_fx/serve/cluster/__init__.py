"""``vlcache serve --replicas N``: several copies of a server on Ray Serve, behind one address.

Needs the extra ``ray``; ``vlcache_fx.serve.extra.require_ray`` says so where it is missing. Nothing here is
imported by a server without replicas.
"""
