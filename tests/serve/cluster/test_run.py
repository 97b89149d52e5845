"""What a cluster checks before it starts Ray."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.cluster.options import ClusterOptions
from vlcache_fx.serve.cluster.run import Cluster, shares_donors, with_absolute_paths
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.sources import check_sources


@pytest.mark.parametrize(
    ("store", "is_shared"),
    [
        ("memory://", False),
        ("file:///folder", True),
        (("memory://", "host://"), False),
        (("memory://", "mooncake://host:1"), True),
    ],
)
def test_which_stores_are_shared(store: Any, is_shared: bool) -> None:
    assert shares_donors(ServeOptions(("reference",), engine={"store": store})) is is_shared


def test_a_cluster_without_a_shared_tier_says_so(caplog: pytest.LogCaptureFixture) -> None:
    Cluster(ServeOptions(("reference",), port=0), ClusterOptions(2))
    assert "the replicas share no donors" in caplog.text


def test_paths_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    options = ServeOptions(
        ("reference", "model", "x=other", "y=photo"),
        engine={"profile": Path("p.json")},
        artifacts=Path("artifacts"),
    )
    found = with_absolute_paths(options)
    monkeypatch.chdir("/")
    assert check_sources(found.models) == {
        "reference": "reference",
        "model": str(tmp_path / "model"),
        "x": str(tmp_path / "other"),
        "y": "photo",
    }
    assert found.engine["profile"] == tmp_path / "p.json"
    assert found.artifacts == tmp_path / "artifacts"


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            Cluster(ServeOptions(("reference",), port=port), ClusterOptions(2))


def test_no_ray_at_an_address_is_named() -> None:
    pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'vlcache_fx[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    cluster = Cluster(
        ServeOptions(("reference",), port=0), ClusterOptions(2, ray_address=f"127.0.0.1:{port}")
    )
    with pytest.raises(OptionError, match=f"Ray cannot be reached at '127.0.0.1:{port}': .*refused"):
        cluster.run()


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlcache_fx.serve import extra

    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("ray", "opencensus") else name)
    with pytest.raises(OptionError, match=r"replicas need ray, opencensus: pip install 'vlcache_fx\[ray\]'"):
        extra.require_ray()
