"""Builds key moves: the steps of keys through a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.kv_caches import CacheOp
from vlcache_fx.ir.scatters import scattered_rows
from vlcache_fx.spec.decoder import CacheValue, KeyMove, MoveKind

aten = torch.ops.aten


def key_moves(ops: Sequence[CacheOp], needed: dict[Node, int]) -> tuple[KeyMove, ...]:
    """Plain data of ``ops``.

    Args:
        ops: operations on the keys of one attention, in order.
        needed: nodes whose values a call must provide, with their index; those of ``ops`` are added.
    """
    return tuple(_key_move(op, needed) for op in ops)


def _key_move(op: CacheOp, needed: dict[Node, int]) -> KeyMove:
    node = op.node

    def value(operand: Any) -> CacheValue | int | None:
        if isinstance(operand, Node):
            return CacheValue(needed.setdefault(operand, len(needed)))
        return None if operand is None else int(operand)

    rows = scattered_rows(node)
    if rows is not None:
        _, dim, positions = rows
        return KeyMove(MoveKind.WRITE, dim, (value(node.args[0]), value(positions)))
    dim = int(node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()  # type: ignore[arg-type]
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return KeyMove(MoveKind.JOIN, dim, tuple(None if part is op.own else value(part) for part in parts))
    start, end, step = (*node.args[2:], None, None, None)[:3]
    return KeyMove(MoveKind.CUT, dim, (value(start), value(end), value(step)))
