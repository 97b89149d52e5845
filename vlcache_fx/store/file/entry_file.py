"""Entries as safetensors files whose every byte is authenticated before it is used.

The tensors lie in the order of the entry, which is that of layers, so that the first can be used while later
ones are read. The metadata has a code per tensor and one over itself, see ``vlcache_fx.store.secret``: bytes
that are torn, flipped, of another key or written without the secret are noticed.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.secret import Authenticator, authentication_code

FORMAT = "vlcache-entry-1"
"""Version of the file. Files of another version are not read."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_ALIGNMENT = 64  # of the first tensor's bytes in the file, for vector instructions
_WRITE_BYTES = 1 << 24  # in one call
_LONGEST_HEADER = 100_000_000  # of safetensors

Writer = Callable[[int, memoryview], int]
"""Writes bytes to a file descriptor and returns how many were written, like ``os.write``."""


@dataclass(frozen=True)
class EncodedEntry:
    """An entry as it will stand in a file.

    Attributes:
        header: the file's first bytes.
        tensors: on the CPU, contiguous; their bytes follow.
    """

    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def write(self, handle: int, write: Writer = os.write) -> None:
        """Write the file to a file descriptor.

        Raises:
            OSError: from ``write``.
        """
        for part in (memoryview(self.header), *map(bytes_of, self.tensors)):
            done = 0
            while done < part.nbytes:
                done += write(handle, part[done : done + _WRITE_BYTES])


def encode(key: str, entry: Entry, secret: bytes) -> EncodedEntry:
    """Return an entry with its codes. Tensors on a GPU are copied; others are not.

    Raises:
        StoreError: safetensors has no such dtype.
        DamagedEntryError: the bytes of an entry that still arrives are not those that were stored.
    """
    layout: dict[str, object] = {}
    codes: list[tuple[str, str]] = []
    tensors: list[Tensor] = []
    offset = 0
    for name, on_device in entry.tensors.items():
        tensor = on_device.detach().cpu().contiguous()
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            raise StoreError(f"safetensors files cannot hold the tensor {name!r} of {tensor.dtype}")
        end = offset + tensor.nbytes
        dtype = _DTYPES[tensor.dtype]
        layout[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        codes.append((name, code_of(secret, key, name, tensor, [bytes_of(tensor)])))
        tensors.append(tensor)
        offset = end
    metadata = {
        "format": FORMAT,
        "key": key,
        "info": json.dumps(dict(entry.info)),
        "codes": json.dumps(codes),
    }
    metadata["code"] = _code_of_metadata(secret, metadata)
    text = json.dumps({"__metadata__": metadata, **layout}).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return EncodedEntry(struct.pack("<Q", len(text)) + text, tuple(tensors))


def read_metadata(path: Path, secret: bytes) -> tuple[str, dict[str, Json]]:
    """Return key and info of a file, authenticated; no tensor is read.

    Raises:
        DamagedEntryError: it is no file that this store wrote.
        OSError: it cannot be read.
    """
    handle = open_file(path)
    try:
        header = Header(handle)
        authenticate(header, secret)
        return header.metadata["key"], json.loads(header.metadata["info"])
    finally:
        os.close(handle)


def inode_of(status: os.stat_result) -> tuple[int, int]:
    """Return device and inode number."""
    return status.st_dev, status.st_ino


class Header:
    """Metadata and mapped tensors of an open safetensors file, checked by that library.

    Attributes:
        nbytes: bytes before the first tensor.
        metadata: its text fields, not authenticated.
        tensors: views of one private mapping; not verified.
    """

    def __init__(self, handle: int) -> None:
        size = os.fstat(handle).st_size
        # Read what the library will map, so that an error of the disk is an exception.
        start = os.pread(handle, 8, 0)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        self.nbytes = 8 + length
        if not 0 < length <= min(_LONGEST_HEADER, size - 8) or len(os.pread(handle, length, 8)) < length:
            raise DamagedEntryError("it is torn")
        try:
            # By descriptor: the path may name another file by now.
            with safe_open(f"/dev/fd/{handle}", "pt") as file:
                self.metadata: Mapping[str, str] = file.metadata() or {}
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (RuntimeError, MemoryError) as error:  # the mapping failed
            raise OSError(str(error)) from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEntryError(f"it is no whole safetensors file: {error}") from error


def open_file(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedEntryError("it is a link") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedEntryError("it is no regular file")
    return handle


def authenticate(header: Header, secret: bytes, key: str | None = None) -> None:
    """Check that a file's metadata is what a store with this secret wrote, for this key if one is given.

    Raises:
        DamagedEntryError: it is not.
    """
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise DamagedEntryError(f"its format is {metadata.get('format', '')[:40]!r}, not {FORMAT!r}")
    if not secrets.compare_digest(
        _code_of_metadata(secret, metadata).encode(), metadata.get("code", "").encode()
    ):
        raise DamagedEntryError("its metadata was not written with this store's secret")
    if key is not None and metadata["key"] != key:
        raise DamagedEntryError(f"it is the entry of another key, {metadata['key']}")
    if {name for name, _ in json.loads(metadata["codes"])} != header.tensors.keys():
        raise DamagedEntryError("its tensors are not those that were stored")


def _code_of_metadata(secret: bytes, metadata: Mapping[str, str]) -> str:
    fields = [(name, text) for name, text in sorted(metadata.items()) if name != "code"]
    return authentication_code(secret, b"metadata", json.dumps(fields).encode())


def code_of(
    secret: bytes, key: str, name: str, tensor: Tensor, chunks: Iterator[memoryview] | list[memoryview]
) -> str:
    what = json.dumps([key, name, _DTYPES.get(tensor.dtype), list(tensor.shape)]).encode()
    authenticator = Authenticator(secret, b"tensor", what)
    authenticator.begin(tensor.nbytes)
    for chunk in chunks:
        authenticator.update(chunk)
    return authenticator.code()


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
