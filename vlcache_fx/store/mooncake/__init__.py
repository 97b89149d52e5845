"""The tier ``mooncake://host:port``: a Mooncake Store that processes and machines share.

Mooncake's client is native code with threads of its own. It runs in a child process (``worker``), so that a
call that hangs, a crash or a slow exit never reaches the process that serves requests.
"""

from vlcache_fx.store.mooncake.settings import MooncakeSettings
from vlcache_fx.store.mooncake.store import MooncakeStore, open_mooncake_store

__all__ = ["MooncakeSettings", "MooncakeStore", "open_mooncake_store"]
