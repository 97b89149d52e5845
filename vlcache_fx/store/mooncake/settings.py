"""Settings of the tier ``mooncake://``, and how its URL names them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlcache_fx.errors import OptionError
from vlcache_fx.store.url import StoreURL, parse_bytes


def default_secret_file() -> Path:
    """Return ``vlcache/secret`` in the user's folder for configuration."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "vlcache" / "secret"


@dataclass(frozen=True)
class MooncakeSettings:
    """How to reach a Mooncake Store, and how long to wait for it.

    A request waits at most ``timeout_ms + transfer_ms`` for an entry. After a failure the tier rests, so the
    next requests wait for nothing.

    Attributes:
        host: the master's host.
        port: the master's port.
        timeout_ms: how long a search for an entry may take.
        transfer_ms: how long the transfer of an entry may take, from its first byte to its last.
        secret_file: file of the secret that authenticates entries; all processes and machines that share
            the store need the same file. None: ``vlcache/secret`` in the user's folder for configuration.
        metadata: Mooncake's metadata server, such as ``http://host:8080/metadata``, or ``P2PHANDSHAKE`` for
            none. All clients of one store need the same.
        protocol: ``tcp`` or ``rdma``.
        device: names of RDMA devices, separated by commas; empty: Mooncake chooses.
        local: address of this machine for the others; empty: that of the interface that leads to the master.
        buffer_bytes: memory that is registered with Mooncake; entries arrive in it, so it bounds the bytes
            of what is read and written at a time.
        admin_port: port of the master's HTTP server (Mooncake's ``metrics_port``), which lists keys; None:
            only what this process wrote is listed.
    """

    host: str
    port: int
    timeout_ms: int = 200
    transfer_ms: int = 2000
    secret_file: Path | None = None
    metadata: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device: str = ""
    local: str = ""
    buffer_bytes: int = 1 << 30
    admin_port: int | None = None

    @classmethod
    def from_url(cls, url: StoreURL) -> MooncakeSettings:
        """Return the settings that a URL names.

        Raises:
            OptionError: the address or a parameter is not valid.
        """
        host, _, port = url.address.rpartition(":")
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:]+\]", host):
            raise _invalid(url, f"{url.address!r} is no host:port, such as 127.0.0.1:50051")
        values: dict[str, Any] = {}
        for name, text in url.parameters.items():
            if name not in _PARAMETERS:
                valid = ", ".join(["capacity", *_PARAMETERS])
                raise _invalid(url, f"unknown {name}; valid: {valid}")
            field, parse = _PARAMETERS[name]
            try:
                values[field] = parse(text)
            except ValueError as error:
                raise _invalid(url, f"{name}: {error}") from error
        try:
            return cls(host, _port(port), **values)
        except ValueError as error:
            raise _invalid(url, str(error)) from error

    @property
    def address(self) -> str:
        """The master's address, ``host:port``."""
        return f"{self.host}:{self.port}"

    def local_address(self) -> str:
        """Return the address of this machine for the others.

        Raises:
            OSError: the master's host is unknown, or cannot be reached.
        """
        if self.local:
            return self.local
        kind, _, _, _, address = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])


def _invalid(url: StoreURL, reason: str) -> OptionError:
    return OptionError(f"option store={url.url!r} is not valid: {reason}")


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 1 << 16:
        raise ValueError(f"{text!r} is no port: 1 to 65535")
    return int(text)


def _milliseconds(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is no positive number of milliseconds")
    return int(text)


def _protocol(text: str) -> str:
    if text not in ("tcp", "rdma"):
        raise ValueError(f"{text!r} is neither tcp nor rdma")
    return text


_PARAMETERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "timeout_ms": ("timeout_ms", _milliseconds),
    "transfer_ms": ("transfer_ms", _milliseconds),
    "secret_file": ("secret_file", Path),
    "metadata": ("metadata", str),
    "protocol": ("protocol", _protocol),
    "device": ("device", str),
    "local": ("local", str),
    "buffer": ("buffer_bytes", parse_bytes),
    "admin_port": ("admin_port", _port),
}
