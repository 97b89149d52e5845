"""Operators that passes insert into graphs: ``torch.ops.vlcache.*``.

Each has a schema, a fake and a reference implementation. Importing this module defines them.
"""

from vlcache_fx.ops.attend import attend, attend_reference, decompose_attend
from vlcache_fx.ops.attention import FastAttention, decompose_attention, row_mask
from vlcache_fx.ops.causal_conv1d import causal_conv1d, decompose_causal_conv1d
from vlcache_fx.ops.fit import fit_rows, fit_rows_reference
from vlcache_fx.ops.linear import decompose_linear
from vlcache_fx.ops.lookup import bind_donors, lookup
from vlcache_fx.ops.recurrence import recur
from vlcache_fx.ops.recurrence_reference import recur_reference
from vlcache_fx.ops.rows import (
    scatter_rows,
    scatter_rows_reference,
    splice_rows,
    splice_rows_reference,
    take_rows,
    take_rows_reference,
)

__all__ = [
    "FastAttention",
    "attend",
    "attend_reference",
    "attention",
    "bind_donors",
    "causal_conv1d",
    "decompose_attend",
    "decompose_attention",
    "decompose_causal_conv1d",
    "decompose_linear",
    "fit_rows",
    "fit_rows_reference",
    "lookup",
    "recur",
    "recur_reference",
    "row_mask",
    "scatter_rows",
    "scatter_rows_reference",
    "splice_rows",
    "splice_rows_reference",
    "take_rows",
    "take_rows_reference",
]
