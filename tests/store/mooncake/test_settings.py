"""URLs of a Mooncake Store."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.store.mooncake import MooncakeSettings
from vlcache_fx.store.mooncake.settings import default_secret_file
from vlcache_fx.store.url import parse_url


def settings_of(url: str) -> MooncakeSettings:
    return MooncakeSettings.from_url(parse_url(url))


def test_defaults() -> None:
    settings = settings_of("mooncake://store.example:50051")
    assert settings == MooncakeSettings("store.example", 50051)
    assert settings.address == "store.example:50051"


def test_all_parameters() -> None:
    settings = settings_of(
        "mooncake://[::1]:1?timeout_ms=5&transfer_ms=6&secret_file=/s&metadata=http://h:8080/metadata"
        "&protocol=rdma&device=mlx5_0,mlx5_1&local=10.0.0.1&buffer=2GiB&admin_port=9003&capacity=1GiB"
    )
    assert settings == MooncakeSettings(
        "[::1]",
        1,
        5,
        6,
        Path("/s"),
        "http://h:8080/metadata",
        "rdma",
        "mlx5_0,mlx5_1",
        "10.0.0.1",
        2 << 30,
        9003,
    )
    assert settings.local_address() == "10.0.0.1"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mooncake://", "is no host:port"),
        ("mooncake://host", "is no host:port"),
        ("mooncake://host:", "'' is no port"),
        ("mooncake://host:0", "'0' is no port"),
        ("mooncake://host:65536", "'65536' is no port"),
        ("mooncake://host:http", "'http' is no port"),
        ("mooncake://a b:1", "is no host:port"),
        ("mooncake://host:1/folder", "'1/folder' is no port"),
        ("mooncake://host:1?timeout=3", "unknown timeout; valid: capacity, timeout_ms"),
        ("mooncake://host:1?timeout_ms=0", "timeout_ms: '0' is no positive number"),
        ("mooncake://host:1?transfer_ms=1.5", "transfer_ms: '1.5' is no positive number"),
        ("mooncake://host:1?protocol=udp", "protocol: 'udp' is neither tcp nor rdma"),
        ("mooncake://host:1?buffer=0", "buffer: '0' is no positive number of bytes"),
        ("mooncake://host:1?admin_port=x", "admin_port: 'x' is no port"),
    ],
)
def test_bad_urls_name_the_value_and_what_is_valid(url: str, message: str) -> None:
    with pytest.raises(OptionError, match="not valid") as raised:
        settings_of(url)
    assert message in str(raised.value)
    assert url in str(raised.value)


def test_local_address_is_that_of_the_way_to_the_master() -> None:
    assert MooncakeSettings("127.0.0.1", 9).local_address() == "127.0.0.1"


def test_default_secret_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert default_secret_file() == Path("/somewhere/vlcache/secret")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_secret_file() == Path.home() / ".config/vlcache/secret"
