"""The error of this comparison."""

from vlcache_fx.errors import VlcacheError


class PeerError(VlcacheError):
    """The other library cannot be installed, started or asked, or a run did not do what its name says."""
