"""Checks and repairs of a policy's rows for one span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan.budget import token_layer_allowance
from vlcache_fx.plan.jumps import chosen_cut
from vlcache_fx.plan.types import Span

_INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def checked_rows(
    chosen: Sequence[Tensor], span: Span, num_layers: int, budget: float | None, strict: bool
) -> tuple[list[Tensor], list[str]]:
    """Make a policy's choice executable: inside the span, sorted, nested and within the budget.

    Args:
        chosen: per layer, row offsets relative to the start of the span.
        span: the span.
        num_layers: number of layers, L.
        budget: share of the span's token-layers, or None if the policy ignores budgets.
        strict: raise instead of repairing.

    Returns:
        L sorted int64 offset tensors (equal neighbours are one object), and a sentence per repair.

    Raises:
        PlanError: the choice is not one tensor of integer offsets per layer; in strict mode also any repair.
    """
    if len(chosen) != num_layers:
        raise PlanError(f"the policy chose rows for {len(chosen)} layers; the model has {num_layers}")
    notes: list[str] = []
    rows = _share_equal([_tensor(rows, layer) for layer, rows in enumerate(chosen)])
    rows = _in_span(rows, span, notes)
    rows = _nested(rows, span, notes)
    if budget is not None:
        rows = _within(rows, span, token_layer_allowance(budget, span.length, num_layers), notes)
    if strict and notes:
        raise PlanError(f"strict mode: {notes[0]}")
    return rows, notes


def grouped_rows(rows: Sequence[Tensor], span: Span, groups: Sequence[int]) -> tuple[list[Tensor], list[str]]:
    """Give all layers of a group the rows of its last layer, which keeps sets nested and in budget.

    Args:
        rows: per layer, checked offsets.
        span: the span.
        groups: number of layers of each group.

    Returns:
        the rows per layer, and a sentence per repair.

    Raises:
        PlanError: the groups do not add up to the number of layers.
    """
    if sum(groups) != len(rows) or any(count < 1 for count in groups):
        raise PlanError(f"groups of {list(groups)} layers do not make up the {len(rows)} layers of the model")
    grouped: list[Tensor] = []
    for count in groups:
        grouped += [rows[len(grouped) + count - 1]] * count
    dropped = sum(len(before) - len(after) for before, after in zip(rows, grouped, strict=True))
    if not dropped:
        return grouped, []
    return grouped, [
        f"{_name(span)}: dropped {dropped} token-layers, so that each group of layers has one set"
    ]


def _name(span: Span) -> str:
    return f"span [{span.start}, {span.end})"


def first_rows(
    rows: Sequence[Tensor], span: Span, outputs: Tensor | None, strict: bool
) -> tuple[list[Tensor], list[str]]:
    """Give all layers the same first rows of a span, up to one of its cuts; see ``plan.jumps``.

    Args:
        rows: per layer, checked offsets.
        span: the span.
        outputs: positions that results need; None for all rows of the last layer.
        strict: raise if the policy chose other rows than first ones.

    Returns:
        The rows per layer, and a sentence if the policy chose other rows than first ones.

    Raises:
        PlanError: see ``strict``.
    """
    notes = []
    if any(len(tensor) and int(tensor[-1]) != len(tensor) - 1 for tensor in rows):
        notes.append(f"{_name(span)}: recurrent layers can recompute the first rows only")
    if strict and notes:
        raise PlanError(f"strict mode: {notes[0]}")
    cut = chosen_cut(span.cuts, [len(tensor) for tensor in rows])
    if outputs is not None and bool(((outputs >= span.start + cut) & (outputs < span.end)).any()):
        cut = span.length
    return [torch.arange(cut)] * len(rows), notes


def _tensor(rows: Tensor, layer: int) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in _INTEGER_TYPES:
        raise PlanError(f"layer {layer}: the policy's rows must be a one-dimensional tensor of integers")
    return rows.detach().to(device="cpu", dtype=torch.int64)


def _share_equal(rows: list[Tensor]) -> list[Tensor]:
    """Replace equal neighbours by one object, so that later steps run once per object."""
    shared = rows[:1]
    for tensor in rows[1:]:
        same = tensor is shared[-1] or torch.equal(tensor, shared[-1])
        shared.append(shared[-1] if same else tensor)
    return shared


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, the first is {layers[0]}"


def _in_span(rows: list[Tensor], span: Span, notes: list[str]) -> list[Tensor]:
    done: dict[int, tuple[Tensor, bool, bool]] = {}
    outside: list[int] = []
    unsorted: list[int] = []
    for layer, tensor in enumerate(rows):
        if id(tensor) not in done:
            inside = tensor[(tensor >= 0) & (tensor < span.length)]
            ordered = torch.unique(inside)  # sorted
            dropped, changed = len(inside) != len(tensor), not torch.equal(ordered, inside)
            done[id(tensor)] = (ordered if dropped or changed else tensor, dropped, changed)
        _, dropped, changed = done[id(tensor)]
        if dropped:
            outside.append(layer)
        if changed:
            unsorted.append(layer)
    if outside:
        notes.append(f"{_name(span)}: dropped rows outside the span ({_layers(outside)})")
    if unsorted:
        notes.append(f"{_name(span)}: rows were not sorted or not unique ({_layers(unsorted)})")
    return [done[id(tensor)][0] for tensor in rows]


def _nested(rows: list[Tensor], span: Span, notes: list[str]) -> list[Tensor]:
    nested = rows[:1]
    broken: list[int] = []
    for layer in range(1, len(rows)):
        before, now = nested[-1], rows[layer]
        if now is rows[layer - 1]:
            nested.append(before)
            if broken and broken[-1] == layer - 1:
                broken.append(layer)
            continue
        kept = now[torch.isin(now, before)]
        if len(kept) != len(now):
            broken.append(layer)
        else:
            kept = now
        nested.append(before if torch.equal(kept, before) else kept)
    if broken:
        notes.append(
            f"{_name(span)}: dropped rows that were not computed in the layer before ({_layers(broken)}); "
            "row sets must shrink with depth"
        )
    return nested


def _within(rows: list[Tensor], span: Span, allowance: int, notes: list[str]) -> list[Tensor]:
    """Drop the latest rows from all layers until the token-layers fit.

    Rows are dropped completely, because a row that stops early is worth little and early rows carry the gain.
    """
    total = sum(len(tensor) for tensor in rows)
    if total <= allowance:
        return rows
    cost = torch.zeros(span.length, dtype=torch.int64)  # layers in which each row is active
    for tensor in rows:
        cost[tensor] += 1
    fits = cost.cumsum(0) <= allowance
    cut: dict[int, Tensor] = {}
    for tensor in rows:
        if id(tensor) not in cut:
            cut[id(tensor)] = tensor[fits[tensor]]
    left = sum(len(cut[id(tensor)]) for tensor in rows)
    notes.append(
        f"{_name(span)}: the policy asked for {total} token-layers, the budget allows {allowance}; "
        f"dropped the latest rows, {left} are left"
    )
    return _share_equal([cut[id(tensor)] for tensor in rows])
