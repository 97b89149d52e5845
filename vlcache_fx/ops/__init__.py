"""The operators that passes insert: ``torch.ops.vlcache.*``.

Each has a schema, a fake implementation and a reference implementation. Importing this module defines them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.ops.attend import attend, attend_reference, decompose_attend
from vlcache_fx.ops.attention import FastAttention, decompose_attention

__all__ = [
    "FastAttention",
    "attend",
    "attend_reference",
    "attention",
    "bind_donors",
    "decompose_attend",
    "decompose_attention",
    "lookup",
    "splice_rows",
    "splice_rows_reference",
]

_donors: ContextVar[Mapping[str, Tensor] | None] = ContextVar("vlcache_donors", default=None)


@contextmanager
def bind_donors(donors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run graphs that still hold ``lookup`` nodes against these donor tables (slot -> table)."""
    token = _donors.set(donors)
    try:
        yield
    finally:
        _donors.reset(token)


@torch.library.custom_op("vlcache::lookup", mutates_args=())
def lookup(like: Tensor, slot: str, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    """The donor table of ``slot``: rows of all hit spans along ``dim``, else shaped and typed as ``like``.

    Lowerings hoist this node to an input; run as it is, it reads what ``bind_donors`` set.
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


def splice_rows_reference(donor: Tensor, fresh: Tensor, source: Tensor, dim: int) -> Tensor:
    """``out[i] = donor[source[i]] if source[i] >= 0 else fresh[-source[i] - 1]`` along ``dim``.

    Args:
        donor: donor table, [..., donor rows, ...].
        fresh: recomputed rows, [..., rows, ...]; same sizes elsewhere.
        source: int64 [tokens].
        dim: the row dimension.

    Returns:
        [..., tokens, ...] of the dtype of ``fresh``.
    """
    shape = [1] * fresh.dim()
    shape[dim] = -1
    stored = donor.index_select(dim, source.clamp(min=0))
    computed = fresh.index_select(dim, (-1 - source).clamp(min=0))
    return torch.where((source >= 0).view(shape), stored, computed)


@torch.library.custom_op("vlcache::splice_rows", mutates_args=())
def splice_rows(donor: Tensor, fresh: Tensor, source: Tensor, dim: int) -> Tensor:
    """See ``splice_rows_reference``."""
    return splice_rows_reference(donor, fresh, source, dim)


@splice_rows.register_fake
def _(donor: Tensor, fresh: Tensor, source: Tensor, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    sizes = list(fresh.shape)
    sizes[dim] = source.shape[0]
    return fresh.new_empty(sizes)
