"""``vlcache version``."""

import vlcache_fx

from .helpers import run


def test_version() -> None:
    assert run("version").strip() == vlcache_fx.__version__
