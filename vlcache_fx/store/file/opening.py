"""Opens the store that a URL names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlcache_fx.errors import OptionError
from vlcache_fx.store.file.store import READS, FileStore
from vlcache_fx.store.secret import load_secret

if TYPE_CHECKING:  # it imports this module
    from vlcache_fx.store.url import StoreURL


def open_file_store(url: StoreURL, capacity_bytes: int) -> FileStore:
    """Open the store of ``file:///absolute/folder?capacity=8GiB&secret_file=/path&read=copy``.

    Args:
        url: the URL; without a capacity, a folder that has a bound keeps it.
        capacity_bytes: bound of a new folder, in bytes.

    Raises:
        OptionError: the path is not absolute, or a parameter is unknown or has a bad value.
        StoreError: see ``FileStore``.
    """
    parameters = dict(url.parameters)
    secret_file, reads = parameters.pop("secret_file", None), parameters.pop("read", READS[0])
    for what, path in (("the folder", url.address), ("secret_file", secret_file)):
        if path is not None and (not path.startswith("/") or "\0" in path):
            raise OptionError(
                f"option store={url.url!r} is not valid: {what} must be an absolute path, as in "
                f"file:///var/cache/vlcache; ~ and variables are not expanded"
            )
    if parameters:
        raise OptionError(
            f"option store={url.url!r} is not valid: unknown {', '.join(parameters)}; "
            f"valid: capacity, secret_file, read"
        )
    if reads not in READS:
        raise OptionError(f"option store={url.url!r} is not valid: read must be one of {', '.join(READS)}")
    return FileStore(
        Path(url.address),
        url.capacity_bytes or capacity_bytes,
        secret=None if secret_file is None else load_secret(Path(secret_file)),
        reads=reads,
        keeps_capacity=url.capacity_bytes is None,
    )
