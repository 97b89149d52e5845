"""Finds, reads, writes and removes the values of entries with one client."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.mooncake.arena import Region
from vlcache_fx.store.mooncake.client import ABSENT, BUFFER_TOO_SMALL, NO_ROOM, TAKEN, MooncakeClient, failed
from vlcache_fx.store.mooncake.manifest import (
    LARGEST_MANIFEST_BYTES,
    LARGEST_RANK,
    SECRET_NAME,
    Manifest,
    Part,
    decode,
    encode,
    manifest_name,
    new_writer,
    part_code,
    rank_of,
    secret_check,
)
from vlcache_fx.store.mooncake.transfer import offsets_of

log = logging.getLogger("vlcache_fx")

RETRY_S = 0.05
"""Between two attempts to write to a store that is full: the master evicts in the background."""


def find(client: MooncakeClient, key: str, secret: bytes, deadline: float) -> tuple[Manifest | None, bool]:
    """Return the manifest of an entry, of the largest rank, and whether a damaged one was found.

    Damaged manifests are logged and removed, and the next smaller rank is taken.

    Raises:
        StoreError: the client failed, or the deadline passed.
    """
    damaged = False
    for rank in reversed(ranks_of(client, key, deadline)):
        name = manifest_name(key, rank)
        data = read_small(client, name, deadline)
        if data is None:
            continue  # it was removed just now
        try:
            return decode(secret, key, rank, data), damaged
        except DamagedEntryError as error:
            damaged = True
            log.warning("vlcache: %s; it counts as a miss, and is removed", error)
            remove(client, [name], left(deadline))
    return None, damaged


def ranks_of(client: MooncakeClient, key: str, deadline: float) -> list[int]:
    """Return the ranks under which manifests of a key exist.

    Raises:
        StoreError: as ``find``.
    """
    names = [manifest_name(key, rank) for rank in range(LARGEST_RANK + 1)]
    codes = client.call("exists", left(deadline), names=names)
    if failed(codes):
        raise client.failure(f"Mooncake returned {min(codes)}")
    return [rank for rank, code in enumerate(codes) if code == 1]


def read_small(client: MooncakeClient, name: str, deadline: float) -> bytes | None:
    """Return a small value; None if there is none. A value that is too large is empty.

    Raises:
        StoreError: as ``find``.
    """
    region = client.arena.allocate(LARGEST_MANIFEST_BYTES)
    if region is None:
        return None  # all memory is in use: a miss
    group = {"names": [name], "offsets": [region.offset], "sizes": [LARGEST_MANIFEST_BYTES]}
    (code,) = client.call("read", left(deadline), groups=[group])
    if code in ABSENT:
        return None
    if code == BUFFER_TOO_SMALL:
        return b""
    if code < 0:
        raise client.failure(f"Mooncake returned {code} for {name!r}")
    return bytes(region.view[:code])


def draft_of(entry: Entry, key: str) -> Manifest:
    """Return an entry's manifest, still without codes."""
    peeked = ((name, entry.peek(name)) for name in entry.tensors)
    parts = tuple(
        Part(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), "")
        for name, tensor in peeked
    )
    return Manifest(key, rank_of(entry), new_writer(), dict(entry.info), parts)


def described(entry: Entry, draft: Manifest, secret: bytes, region: Region) -> Manifest:
    """Copy an entry's tensors to a region with room for them, and return the manifest with their codes."""
    parts = []
    for part, start in zip(draft.parts, offsets_of(draft), strict=True):
        region.tensor(start, part.torch_dtype, part.shape).copy_(entry.tensors[part.name])
        data = region.view[start : start + part.nbytes]
        code = part_code(secret, draft.key, part.name, part.dtype, part.shape, data)
        parts.append(replace(part, code=code))
    return replace(draft, parts=tuple(parts))


def write(
    client: MooncakeClient,
    manifest: Manifest,
    region: Region,
    secret: bytes,
    deadline: float,
    replaces: Manifest | None,
) -> bool:
    """Write an entry's tensors from a region, and then its manifest. Return False if the store is full.

    Args:
        client: whose memory holds the region.
        manifest: of the entry.
        region: its tensors.
        secret: of the store.
        deadline: by ``time.monotonic``.
        replaces: the entry that was found under the key. It is found until the new one is whole; its tensors
            go if nobody reads them, else they age out.

    Raises:
        StoreError: as ``find``.
    """
    held = [index for index, part in enumerate(manifest.parts) if part.nbytes > 0]
    names, offsets = manifest.part_names, offsets_of(manifest)
    names = [names[index] for index in held]
    starts = [region.offset + offsets[index] for index in held]
    sizes = [manifest.parts[index].nbytes for index in held]
    done = _write(client, names, starts, sizes, deadline)
    # A store that is full may have evicted the first tensors to make room for the last.
    done = done and all(code == 1 for code in client.call("exists", left(deadline), names=names))
    if done:
        # Otherwise they would be found before the new one, or keep it from being put. If both have equal
        # ranks, a larger one is that of another process, which was put meanwhile, and stays.
        if replaces is not None and replaces.rank >= manifest.rank:
            last = manifest.rank if replaces.rank == manifest.rank else LARGEST_RANK
            ranks = range(manifest.rank, last + 1)
            remove(client, [manifest_name(manifest.key, rank) for rank in ranks], left(deadline))
        done = write_small(client, manifest.name, encode(secret, manifest), deadline)
    if not done:
        remove(client, names, left(deadline))
    elif replaces is not None:
        if replaces.rank < manifest.rank:
            remove(client, [replaces.name], left(deadline))
        remove(client, replaces.part_names, left(deadline), force=False)
    return done


def write_small(
    client: MooncakeClient, name: str, data: bytes, deadline: float, *, pinned: bool = False
) -> bool:
    """Write a small value; as ``write``."""
    region = client.arena.allocate(len(data))
    if region is None or len(data) > LARGEST_MANIFEST_BYTES:
        return False
    region.view[: len(data)] = data
    return _write(client, [name], [region.offset], [len(data)], deadline, pinned=pinned)


def remove(client: MooncakeClient, names: Sequence[str], timeout_s: float, *, force: bool = True) -> None:
    """Remove values if possible; without ``force``, not those that are being read.

    Raises:
        StoreError: as ``find``.
    """
    if names:
        client.call("remove", timeout_s, names=list(names), force=force)


def remove_entry(
    client: MooncakeClient, manifest: Manifest, secret: bytes, deadline: float, *, force: bool = True
) -> None:
    """Remove an entry, but not one that another process has put under the same name meanwhile.

    Without ``force``, tensors that are being read stay, and age out.

    Raises:
        StoreError: as ``find``.
    """
    if read_small(client, manifest.name, deadline) == encode(secret, manifest):
        remove(client, [manifest.name], left(deadline))
    remove(client, manifest.part_names, left(deadline), force=force)


def check_secret(client: MooncakeClient, secret: bytes, deadline: float) -> None:
    """Compare the secret with that of the other clients; the first one leaves what the others compare.

    Raises:
        StoreError: they have another secret, or as ``find``.
    """
    expected = secret_check(secret)
    held = read_small(client, SECRET_NAME, deadline)
    if held is None and write_small(client, SECRET_NAME, expected, deadline, pinned=True):
        held = read_small(client, SECRET_NAME, deadline)  # another client may have been faster
    if held is not None and held != expected:
        raise StoreError("wrong secret: the store was filled by processes with another secret_file")


def left(deadline: float) -> float:
    """Return the seconds until a deadline, at least 0."""
    return max(0.0, deadline - time.monotonic())


def _write(
    client: MooncakeClient,
    names: Sequence[str],
    offsets: Sequence[int],
    sizes: Sequence[int],
    deadline: float,
    *,
    pinned: bool = False,
) -> bool:
    todo = list(zip(names, offsets, sizes, strict=True))
    while todo:
        columns = {
            "names": [t[0] for t in todo],
            "offsets": [t[1] for t in todo],
            "sizes": [t[2] for t in todo],
        }
        codes = client.call("write", left(deadline), pinned=pinned, **columns)
        if any(code < 0 and code not in NO_ROOM | TAKEN for code in codes):
            raise client.failure(f"Mooncake returned {min(codes)} for a write")
        todo = [value for value, code in zip(todo, codes, strict=True) if code in NO_ROOM]
        if todo and left(deadline) < 2 * RETRY_S:
            return False
        if todo:
            time.sleep(RETRY_S)
    return True
