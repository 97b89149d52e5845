"""The value that a store keeps under one key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

Wait: TypeAlias = Callable[[], None]
"""Blocks until a tensor's bytes have arrived and are verified; raises ``DamagedEntryError`` otherwise."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Named tensors and JSON data, both as read-only mappings.

    Each tensor is detached, contiguous and alone in its storage, so an entry occupies exactly ``nbytes`` and
    never keeps a larger activation alive. Tensors are copied, so later writes by the caller do not change the
    entry. With ``copy=False``, only views and inference tensors are copied; the caller must not write to the
    others. An entry's tensors are read-only.

    Attributes:
        tensors: the tensors by name. Reading one waits until it has arrived.
        info: JSON data.
        tier: name of the tier that the entry comes from; None for the memory of this process.

    Raises:
        StoreError: a value is not a strided tensor, or ``info`` is not JSON data.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Json]
    copy: InitVar[bool] = True
    tier: str | None = None
    _waits: Mapping[str, Wait] = field(default_factory=dict, repr=False)

    def __post_init__(self, copy: bool) -> None:
        try:
            # The round trip checks for JSON data and shares nothing mutable with the caller.
            info = json.loads(json.dumps(dict(self.info), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError(f"an entry's info must be JSON data: {error}") from error
        if not self._waits:  # else the tensors are a tier's own, and may still arrive
            tensors = {name: _own(name, tensor, copy) for name, tensor in self.tensors.items()}
            object.__setattr__(self, "tensors", MappingProxyType(tensors))
        object.__setattr__(self, "info", MappingProxyType(info))

    @classmethod
    def pending(
        cls, tensors: Mapping[str, Tensor], info: Mapping[str, Json], waits: Mapping[str, Wait], tier: str
    ) -> Entry:
        """Return an entry of a slow tier, whose tensors may still arrive; ``waits`` has one function each.

        The tensors may be views of larger storage, such as a mapped file. Nothing is copied.
        """
        return cls(_Pending(dict(tensors), dict(waits)), info, copy=False, tier=tier, _waits=waits)

    def peek(self, name: str) -> Tensor:
        """Return a tensor whose bytes may still arrive: for its dtype and shape."""
        return self.tensors.peek(name) if isinstance(self.tensors, _Pending) else self.tensors[name]

    def wait_of(self, name: str) -> Wait | None:
        """Return the function that waits for a tensor; None if it is there."""
        return self._waits.get(name)

    @property
    def is_pending(self) -> bool:
        """True if reading a tensor may wait."""
        return bool(self._waits)

    def wait(self) -> None:
        """Wait for all tensors.

        Raises:
            DamagedEntryError: the bytes of a tensor are not those that were stored.
        """
        for wait in self._waits.values():
            wait()

    def materialized(self) -> Entry:
        """Return the entry with all tensors in memory of its own, verified; itself if they are.

        Raises:
            DamagedEntryError: as ``wait``.
        """
        return Entry(dict(self.tensors), self.info) if self._waits or self.tier else self

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(self.peek(name).nbytes for name in self.tensors)


class _Pending(Mapping[str, Tensor]):
    """Tensors that may still arrive; reading one waits for it."""

    def __init__(self, tensors: Mapping[str, Tensor], waits: Mapping[str, Wait]) -> None:
        self._tensors, self._waits = tensors, waits

    def peek(self, name: str) -> Tensor:
        """Return a tensor without waiting."""
        return self._tensors[name]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if name in self._waits:
            self._waits[name]()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's would read the tensor, and so wait

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def contexts_in(info: Mapping[str, Json]) -> int:
    """Return the number of contexts in a donor's mean; 0 for other entries."""
    contexts = info.get("contexts")
    return len(contexts) if isinstance(contexts, list) else 0


def main_names(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that are no part of another: ``0.k``, but not ``0.k.left`` beside it."""
    found = set(names)
    return [name for name in sorted(found) if name.rpartition(".")[0] not in found]


def is_better(found: Entry, new: Entry) -> bool:
    """Return whether a stored donor serves instead of a new one: the same tensors, of more contexts."""
    names = main_names(new.tensors)
    return (
        contexts_in(found.info) > contexts_in(new.info) > 0
        and names == main_names(found.tensors)
        and all(
            (found.peek(name).dtype, found.peek(name).shape) == (new.peek(name).dtype, new.peek(name).shape)
            for name in names
        )
    )


def _own(name: str, tensor: Tensor, copy: bool) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise StoreError(f"an entry's {name!r} must be a dense tensor, not {type(tensor).__name__}")
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    plain = not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
    if not copy and exact and plain and tensor.is_contiguous():
        return tensor.detach()
    # Outside inference mode, because later calls with autograd cannot use inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        owned = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return owned.copy_(tensor)
