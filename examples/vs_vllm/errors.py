"""The error of this comparison."""

from vlcache_fx.errors import VlcacheError


class PeerError(VlcacheError):
    """A library cannot be installed, started or called, or a run did not match its case."""
