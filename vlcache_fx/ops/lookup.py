"""``torch.ops.vlcache.lookup``: the donor table of a slot."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError

__all__ = ["bind_donors", "lookup"]

_donors: ContextVar[Mapping[str, Tensor] | None] = ContextVar("vlcache_donors", default=None)


@contextmanager
def bind_donors(donors: Mapping[Any, Tensor]) -> Iterator[None]:
    """Provide donor tables (slot, or its name -> table) to ``lookup`` nodes that run within the body."""
    token = _donors.set({str(slot): table for slot, table in donors.items()})
    try:
        yield
    finally:
        _donors.reset(token)


@torch.library.custom_op("vlcache::lookup", mutates_args=())
def lookup(like: Tensor, slot: str, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    """Return the donor table of ``slot``: rows of all hit spans along ``dim``, else the shape of ``like``.

    Lowerings replace this node by an input. When executed, it returns a copy of the table from
    ``bind_donors``.

    Raises:
        StoreError: no table is bound for ``slot``.
    """
    donors = _donors.get()
    if donors is None or slot not in donors:
        raise StoreError(f"no donor table is bound for slot {slot!r}; bound: {sorted(donors or ())}")
    return donors[slot].clone()


@lookup.register_fake
def _(like: Tensor, slot: str, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    sizes: list[int | torch.SymInt] = list(like.shape)
    sizes[dim] = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(sizes)
