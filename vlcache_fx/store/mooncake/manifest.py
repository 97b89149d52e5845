"""What a Mooncake Store holds of an entry: a value per tensor, and a manifest that authenticates them.

Names. A manifest is ``vlcache1.KEY.N``, where N is the number of contexts in a donor's mean, and 0 for
other entries. A tensor is ``vlcache1p.KEY.N.WRITER.INDEX``. Values of a Mooncake Store are put once: a
second put of a name keeps the first value. So a refined donor, a better value under the same key, gets a
manifest of its own, and readers take that of the largest N. WRITER is random: tensors of two processes that
store the same key at the same time never mix, and the manifest, which is put last, names those of one of
them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlcache_fx.errors import DamagedEntryError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.entry import Entry, Json, contexts_in, main_names
from vlcache_fx.store.secret import authentication_code

PREFIX = "vlcache1"
"""Names of another format begin otherwise, so they are never found."""

SECRET_NAME = "vlcache-secret"
"""Name of the value that tells clients whether they have the same secret."""

LARGEST_RANK = 16
"""Donors of more contexts share this rank: the latest replaces the others."""

CODE_DIGITS = 64

LARGEST_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """One tensor of an entry.

    Attributes:
        name: its name in the entry.
        dtype: such as ``float32``.
        shape: its shape.
        code: authenticates its bytes, see ``part_code``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    code: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(torch.Size(self.shape).numel()) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """The tensors and the data of an entry.

    Attributes:
        key: the entry's key.
        rank: the number of contexts in its mean, see above.
        writer: random digits in the names of its tensors.
        info: its JSON data.
        parts: its tensors, first layers first.
    """

    key: str
    rank: int
    writer: str
    info: Mapping[str, Json]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Name of the manifest in the store."""
        return manifest_name(self.key, self.rank)

    @property
    def part_names(self) -> list[str]:
        """Names of the tensors in the store."""
        head = f"{PREFIX}p.{self.key}.{self.rank}.{self.writer}"
        return [f"{head}.{index}" for index in range(len(self.parts))]

    @property
    def names(self) -> list[str]:
        """All names in the store, the manifest's first."""
        return [self.name, *self.part_names]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in self.parts)

    def has_layout_of(self, other: Manifest) -> bool:
        """Return whether another entry has the same tensors but for their parts, see ``main_names``."""
        return self._layout == other._layout

    @property
    def _layout(self) -> set[tuple[str, str, tuple[int, ...]]]:
        names = set(main_names(part.name for part in self.parts))
        return {(part.name, part.dtype, tuple(part.shape)) for part in self.parts if part.name in names}

    def has_content_of(self, other: Manifest) -> bool:
        """Return whether another entry is equal."""
        return self.parts == other.parts and self.info == other.info


def rank_of(entry: Entry) -> int:
    """Return the number of contexts in a donor's mean; 0 for other entries."""
    return min(contexts_in(entry.info), LARGEST_RANK)


def manifest_name(key: str, rank: int) -> str:
    """Return the name of a manifest."""
    return f"{PREFIX}.{key}.{rank}"


def key_of(name: str) -> tuple[str, int] | None:
    """Return key and rank in the name of a manifest; None for other names."""
    match = re.fullmatch(rf"{PREFIX}\.(.+)\.(\d+)", name, re.DOTALL)
    return (match[1], int(match[2])) if match else None


def patterns_of(selection: Selection | None) -> tuple[str, str]:
    """Return regular expressions for names: of selected manifests, and of tensors."""
    keys = ".+" if selection is None else selection.pattern
    return rf"^{PREFIX}\.{keys}\.[0-9]+$", rf"^{PREFIX}p\.{keys}\.[0-9]+\."


def new_writer() -> str:
    """Return random digits for the names of an entry's tensors."""
    return secrets.token_hex(8)


def part_code(secret: bytes, key: str, name: str, dtype: str, shape: Sequence[int], data: memoryview) -> str:
    """Return the code of a tensor's bytes under its key and name."""
    return authentication_code(
        secret, b"part", key.encode(), name.encode(), dtype.encode(), json.dumps(list(shape)).encode(), data
    )


def encode(secret: bytes, manifest: Manifest) -> bytes:
    """Return a manifest as bytes: its code, and JSON."""
    body: dict[str, Any] = {
        "writer": manifest.writer,
        "info": dict(manifest.info),
        "parts": [[part.name, part.dtype, list(part.shape), part.code] for part in manifest.parts],
    }
    data = json.dumps(body).encode()
    return _code(secret, manifest.key, manifest.rank, data).encode() + data


def decode(secret: bytes, key: str, rank: int, data: bytes) -> Manifest:
    """Return the manifest in bytes that were found under a key and rank.

    Raises:
        DamagedEntryError: they were not stored with this secret, or not under this name.
    """
    code, body = data[:CODE_DIGITS], data[CODE_DIGITS:]
    if code != _code(secret, key, rank, body).encode():
        raise DamagedEntryError(
            f"{manifest_name(key, rank)!r} in the Mooncake Store was not stored with this secret"
        )
    held = json.loads(body)  # by us, as the code says
    parts = tuple(Part(name, dtype, tuple(shape), code) for name, dtype, shape, code in held["parts"])
    return Manifest(key, rank, held["writer"], held["info"], parts)


def secret_check(secret: bytes) -> bytes:
    """Return the value that all clients of a store compare: it does not tell the secret."""
    return authentication_code(secret, b"vlcache: the secret of this store").encode()


def _code(secret: bytes, key: str, rank: int, body: bytes) -> str:
    return authentication_code(secret, b"manifest", key.encode(), str(rank).encode(), body)
