"""The secret of a store, and the codes that authenticate what is read from it.

Whoever can write to a folder or a remote store could plant rows there. A code needs the secret, so bytes of
others, bytes under another key and bytes of a store with another secret are all noticed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import struct
from pathlib import Path

from blake3 import blake3

from vlcache_fx.errors import StoreError

SECRET_BYTES = 32


class Authenticator:
    """Computes a code, part by part; a long part can come in chunks.

    Args:
        secret: ``SECRET_BYTES`` bytes.
        parts: the first parts.
    """

    def __init__(self, secret: bytes, *parts: bytes | memoryview) -> None:
        self._hasher = blake3(key=secret)
        for part in parts:
            view = memoryview(part)
            self.begin(view.nbytes)
            self.update(view)

    def begin(self, nbytes: int) -> None:
        """Begin a part of that many bytes, which ``update`` then takes."""
        self._hasher.update(struct.pack("<Q", nbytes))

    def update(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes of a part."""
        self._hasher.update(chunk)

    def code(self) -> str:
        """Return the code of all parts so far, as 64 hexadecimal digits."""
        return self._hasher.hexdigest()


def authentication_code(secret: bytes, *parts: bytes | memoryview) -> str:
    """Return the keyed BLAKE3 hash of length-prefixed parts, as 64 hexadecimal digits.

    Args:
        secret: ``SECRET_BYTES`` bytes.
        parts: bytes, such as a key, a name and a tensor's bytes.
    """
    return Authenticator(secret, *parts).code()


def load_secret(path: Path) -> bytes:
    """Return the secret in a file; create it with mode 0600 if there is none.

    Processes that create it at the same time get the same secret.

    Raises:
        StoreError: the file cannot be read or written, can be read by others, or holds no secret.
    """
    try:
        if not path.exists():
            _create(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read the secret {path}: {error.strerror}") from error
    if mode & 0o077:
        raise StoreError(f"the secret {path} has mode {mode:04o}, so others can read it: set it to 0600")
    if len(secret) != SECRET_BYTES:
        raise StoreError(f"the secret {path} has {len(secret)} bytes, not {SECRET_BYTES}: it is no secret")
    return secret


def _create(path: Path) -> None:
    """Write a new secret under another name, and link it: the file is whole as soon as it exists."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with contextlib.ExitStack() as after:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        after.callback(draft.unlink)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(draft, path)
