"""``vlcache version``."""

import json

import vlcache_fx

from .helpers import run


def test_version_prints_version() -> None:
    assert run("version") == f"{vlcache_fx.__version__}\n"


def test_version_as_json() -> None:
    assert json.loads(run("version", "--json")) == {"vlcache_fx": vlcache_fx.__version__}
