"""An entry on its way from a Mooncake Store: layers are verified, and can be used, as they come."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store.entry import Entry, Wait
from vlcache_fx.store.mooncake.arena import Region, aligned
from vlcache_fx.store.mooncake.client import ABSENT, BUFFER_TOO_SMALL, LEASE_EXPIRED, MooncakeClient
from vlcache_fx.store.mooncake.manifest import Manifest, Part, part_code

GROUP_BYTES = 8 << 20
"""Consecutive tensors of about this size are one transfer."""


@dataclass(frozen=True)
class Outcome:
    """What became of a transfer.

    Attributes:
        damaged: the bytes were not those that were stored.
        gone: a tensor is no longer stored, so the entry is of no use.
        client_failed: the client failed, or did not answer in time.
        reason: in words; empty if all is well.
    """

    damaged: bool = False
    gone: bool = False
    client_failed: bool = False
    reason: str = ""


@dataclass(eq=False)
class _Group:
    """Consecutive tensors; ``error`` is set before ``done``."""

    indices: list[int]
    done: threading.Event = field(default_factory=threading.Event)
    error: str = ""


class Transfer:
    """Reads an entry in groups of tensors, in the background.

    Args:
        client: reads; its memory holds ``region``.
        region: room for the tensors, at ``offsets_of(manifest)``.
        manifest: names and codes of the tensors.
        secret: of the store.
        deadline: of the last byte, by ``time.monotonic``.
        ended: called once, in the background thread.
    """

    def __init__(
        self,
        client: MooncakeClient,
        region: Region,
        manifest: Manifest,
        secret: bytes,
        deadline: float,
        ended: Callable[[Outcome], None],
    ) -> None:
        self._client, self._region, self._manifest, self._secret = client, region, manifest, secret
        self._deadline, self._ended = deadline, ended
        self._offsets = offsets_of(manifest)
        self._groups = [_Group(indices) for indices in _groups_of(manifest.parts)]
        names = manifest.part_names
        requests = [
            {
                "names": [names[index] for index in group.indices],
                "offsets": [region.offset + self._offsets[index] for index in group.indices],
                "sizes": [manifest.parts[index].nbytes for index in group.indices],
            }
            for group in self._groups
        ]
        if not requests:
            ended(Outcome())
            return
        codes = client.stream("read", deadline, len(requests), groups=requests)
        threading.Thread(
            target=self._receive, args=(codes,), name="vlcache-mooncake-transfer", daemon=True
        ).start()

    def entry(self, tier: str) -> Entry:
        """Return the entry, whose tensors may still arrive."""
        tensors: dict[str, Tensor] = {}
        waits: dict[str, Wait] = {}
        for group in self._groups:
            for index in group.indices:
                part = self._manifest.parts[index]
                tensors[part.name] = self._region.tensor(self._offsets[index], part.torch_dtype, part.shape)
                waits[part.name] = functools.partial(self._wait, group)
        for part in self._manifest.parts:
            if part.name not in tensors:  # no bytes to wait for
                tensors[part.name] = self._region.tensor(0, part.torch_dtype, part.shape)
                waits[part.name] = _nothing
        ordered = {part.name: tensors[part.name] for part in self._manifest.parts}
        return Entry.pending(ordered, self._manifest.info, waits, tier)

    def _wait(self, group: _Group) -> None:
        late = not group.done.wait(max(0.0, self._deadline - time.monotonic()))
        if late or group.error:
            reason = group.error or "it did not arrive in time"
            raise DamagedEntryError(f"entry {self._manifest.key!r} of the Mooncake Store: {reason}")

    def _receive(self, codes: Iterator[list[int]]) -> None:
        outcome = Outcome()
        try:
            for group in self._groups:
                received = next(codes)
                if not outcome.reason:  # else the rest is awaited, as it still writes to the region
                    outcome = self._verified(group, received)
                group.error = outcome.reason
                group.done.set()
        except StoreError as error:
            outcome = Outcome(client_failed=True, reason=str(error))
        for group in self._groups:
            if not group.done.is_set():
                group.error = outcome.reason
                group.done.set()
        self._ended(outcome)

    def _verified(self, group: _Group, received: list[int]) -> Outcome:
        for index, code in zip(group.indices, received, strict=True):
            part = self._manifest.parts[index]
            if code == LEASE_EXPIRED:
                return Outcome(reason=f"the transfer of {part.name!r} took longer than its lease")
            if code in ABSENT:
                return Outcome(gone=True, reason=f"{part.name!r} is no longer stored")
            if code < 0 and code != BUFFER_TOO_SMALL:
                raise self._client.failure(f"Mooncake returned {code} for {part.name!r}")
            start = self._offsets[index]
            data = self._region.view[start : start + part.nbytes]
            if code != part.nbytes or part.code != part_code(
                self._secret, self._manifest.key, part.name, part.dtype, part.shape, data
            ):
                return Outcome(
                    damaged=True, reason=f"the bytes of {part.name!r} are not those that were stored"
                )
        return Outcome()


def offsets_of(manifest: Manifest) -> list[int]:
    """Return where each tensor begins in a region: each at a page."""
    offsets, end = [], 0
    for part in manifest.parts:
        offsets.append(end)
        end += aligned(part.nbytes)
    return offsets


def room_of(manifest: Manifest) -> int:
    """Return the size of a region for all tensors, in bytes."""
    return max(1, sum(aligned(part.nbytes) for part in manifest.parts))


def _groups_of(parts: tuple[Part, ...]) -> Iterator[list[int]]:
    group: list[int] = []
    nbytes = 0
    for index, part in enumerate(parts):
        if part.nbytes == 0:
            continue
        group.append(index)
        nbytes += part.nbytes
        if nbytes >= GROUP_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _nothing() -> None:
    """Wait for a tensor without bytes."""
