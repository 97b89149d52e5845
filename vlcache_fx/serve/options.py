"""The options of a server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlcache_fx.errors import OptionError
from vlcache_fx.options import Options

MIB = 1024**2


@dataclass(frozen=True)
class ServeOptions:
    """Checked options of ``vlcache serve``.

    Attributes:
        models: what is served: ``reference``, ``photo``, ``hybrid``, a folder of a transformers model, or
            ``NAME=FOLDER``. A folder is served under its own name.
        host, port: address to listen on; with port 0 the system chooses one.
        engine: options of ``vlcache_fx.compile`` for every model, such as ``store`` and ``budget``.
        device: device of the models; ``auto`` is the GPU if there is one.
        dtype: dtype of models that come from folders; ``auto`` is that of their weights.
        batch_size: largest number of requests that run together; 1 turns batching off.
        batch_tokens: largest number of tokens that requests compute together before their first answers, with
            padding; None for 2,048 on a CPU and 8,192 on a GPU. Known pictures count little.
        batch_wait_ms: longest time that a request waits for others to run with. With 0, those run together
            that have come while the model was busy.
        max_waiting: largest number of requests that wait for one model; more are refused with status 429.
        max_body_bytes: largest body of a request.
        max_images: largest number of pictures of a request.
        max_image_bytes: largest picture, as it is sent.
        max_image_pixels: largest picture, decoded.
        max_prompt_tokens: longest prompt with its pictures; None for the model's context length.
        max_output_tokens: longest answer that a request may ask for.
        media_hosts: hosts from which pictures may be loaded, ``HOST`` or ``HOST:PORT``; none by default.
        media_folders: folders below which ``file://`` URLs may lie; none by default.
        media_timeout_s: limit for loading one remote picture.
        api_keys: the keys that clients must send, as ``Authorization: Bearer KEY``; with none, all may ask.
        salt_from_api_key: requests with different keys share no donors.
        shutdown_timeout_s: how long running requests may take to end when the server stops.
        artifacts: a folder of ``vlcache warm-up``, whose programs are not compiled again; None compiles all.

    Raises:
        OptionError: an option has a bad value; the message names it and the valid ones.
    """

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    engine: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8
    batch_tokens: int | None = None
    batch_wait_ms: float = 0.0
    max_waiting: int = 64
    max_body_bytes: int = 64 * MIB
    max_images: int = 16
    max_image_bytes: int = 20 * MIB
    max_image_pixels: int = 50_000_000
    max_prompt_tokens: int | None = None
    max_output_tokens: int = 4096
    media_hosts: tuple[str, ...] = ()
    media_folders: tuple[Path, ...] = ()
    media_timeout_s: float = 10.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    salt_from_api_key: bool = False
    shutdown_timeout_s: float = 30.0
    artifacts: Path | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise OptionError("no model is named: pass reference, photo, hybrid, or a folder")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port={self.port!r} is not valid: it must be a number in [0, 65535]")
        for name in COUNTS:
            _check_count(name, getattr(self, name))
        for name in ("batch_tokens", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in TIMES:
            check_number(name, getattr(self, name))
        for host in self.media_hosts:
            if not host or any(sign in host for sign in "/@*? "):
                raise OptionError(f"media host {host!r} is not valid: it must be HOST or HOST:PORT")
        folders = tuple(_existing_folder(folder) for folder in self.media_folders)
        object.__setattr__(self, "media_folders", folders)
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise OptionError("an API key is not valid: keys are ASCII text and not empty")
        Options.parse(self.engine)

    @property
    def key_salt(self) -> str:
        """The salt of requests without a salt of their own."""
        return Options.parse(self.engine).salt


COUNTS = tuple(
    entry.name for entry in fields(ServeOptions) if entry.type == "int" and entry.name not in ("port",)
)
TIMES = ("batch_wait_ms", "media_timeout_s", "shutdown_timeout_s")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}={value!r} is not valid: it must be a positive integer")


def check_number(name: str, value: object) -> None:
    """Raise OptionError unless the value is a number >= 0."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise OptionError(f"{name}={value!r} is not valid: it must be a number >= 0")


def _existing_folder(folder: Path) -> Path:
    if not Path(folder).is_dir():
        raise OptionError(f"media folder {str(folder)!r} is not valid: there is no such folder")
    return Path(folder).resolve()
