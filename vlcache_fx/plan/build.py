"""Construction of the checked plan of one request from its spans and a policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan.jumps import Jump, Record
from vlcache_fx.plan.repair import checked_rows, first_rows, grouped_rows
from vlcache_fx.plan.types import Plan, Span, SpanContext

if TYPE_CHECKING:
    from vlcache_fx.policies.profile import Profile


class RowChooser(Protocol):
    """The part of ``vlcache_fx.policies.base.Policy`` that plans use."""

    @property
    def ignores_budget(self) -> bool:
        """True if the plan must not cut the policy's rows to the budget."""

    def select(self, span: SpanContext, /) -> Sequence[Tensor]:
        """Per layer, row offsets relative to the start of a span."""


def build_plan(
    *,
    num_tokens: int,
    spans: Sequence[Span],
    num_layers: int,
    policy: RowChooser,
    profile: Profile | None = None,
    budget: float,
    output_rows: Tensor | None = None,
    strict: bool = False,
    prefix: int = 0,
    padding: Tensor | None = None,
    first_donor: int = 0,
    first_map: int = 0,
    first_tail: int = 0,
    groups: Sequence[int] = (),
    records: Sequence[Record] | None = None,
) -> Plan:
    """Return the plan of one request.

    Active in every layer are the rows of text, of missed spans and of outputs. Hit spans contribute the
    policy's rows; an exactly reused prefix contributes none.

    Args:
        num_tokens: N, at least 1.
        spans: sorted, disjoint, inside [0, N), all of one sample.
        num_layers: L, at least 1.
        policy: chooses the rows of each hit span.
        profile: per-layer sensitivities, passed to the policy unchanged.
        budget: share in [0, 1] of each hit span's token-layers. Rows beyond it are dropped, the latest first
            (see ``vlcache_fx.plan.budget`` for the rounding).
        output_rows: positions that outputs need after the last layer; None for all rows of the last layer.
        strict: raise instead of repairing a policy's choice.
        prefix: number of tokens at the start with exact donors, the first rows of the donor table. Spans lie
            inside or after the prefix.
        padding: positions that no token attends to. Outside of spans they are not computed, unless outputs
            need them or the policy ignores budgets; their values are those of the first donor row.
        first_donor: the sample's first row in the donor table.
        first_map, first_tail: the sample's first entries in the tables of maps, and of last inputs.
        groups: sizes of groups of neighbouring layers that compute the same rows, those of the group's last
            layer. The sizes add up to L; by default each layer is a group.
        records: records whose states are recorded; None without recurrent layers. With these, all layers
            compute the same first rows of a hit span, up to one of its cuts.

    Raises:
        PlanError: invalid spans, sizes or output rows; in strict mode also any repair.
    """
    if num_tokens < 1 or num_layers < 1:
        raise PlanError(
            f"a plan needs tokens and layers: got num_tokens={num_tokens}, num_layers={num_layers}"
        )
    if not 0 <= budget <= 1:
        raise PlanError(f"budget {budget!r} is not a share in [0, 1]")
    _check_spans(spans, num_tokens)
    outputs = None if output_rows is None else _checked_outputs(output_rows, num_tokens)

    if not 0 <= prefix <= num_tokens or any(span.start < prefix < span.end for span in spans):
        raise PlanError(f"a prefix of {prefix} tokens is not inside [0, {num_tokens}], or cuts a span")
    reused = [span for span in spans if span.hit]
    hits = [span for span in reused if span.start >= prefix]
    notes: list[str] = []
    chosen: list[list[Tensor]] = []
    text = _text(num_tokens, spans, padding)
    for span in hits:
        selected = policy.select(
            SpanContext(
                length=span.length,
                num_layers=num_layers,
                budget=budget,
                profile=profile,
                start=span.start,
                num_tokens=num_tokens,
                text_before=int(text[: span.start].sum()),
                text_after=int(text[span.end :].sum()),
                grid=span.grid,
                contexts=max(1, span.contexts),
            )
        )
        limit = None if policy.ignores_budget else budget
        rows_of_span, repairs = checked_rows(selected, span, num_layers, limit, strict)
        if groups:
            rows_of_span, grouping = grouped_rows(rows_of_span, span, groups)
            repairs = [*repairs, *grouping]
        if records is not None:
            rows_of_span, first = first_rows(rows_of_span, span, outputs, strict)
            repairs = [*repairs, *first]
        chosen.append(rows_of_span)
        notes.extend(repairs)

    computed = torch.ones(num_tokens, dtype=torch.bool)
    donors = torch.zeros(num_tokens, dtype=torch.int64)
    if padding is not None and not policy.ignores_budget:
        computed[padding] = False
        for span in spans:
            computed[span.start : span.end] = True  # donors are recorded for complete spans
    computed[:prefix] = False
    donors[:prefix] = torch.arange(first_donor, first_donor + prefix)
    offset = first_donor + prefix
    for span in hits:
        computed[span.start : span.end] = False
        donors[span.start : span.end] = torch.arange(offset, offset + span.length)
        offset += span.length
    if outputs is not None:
        computed[outputs] = True
    more = _at_least_two(computed, hits, [rows_of_span[-1] for rows_of_span in chosen])
    if more and records is not None and (hits or prefix):
        raise PlanError("recurrent layers need two computed tokens, and a donor has all others")
    notes.extend(more)

    rows, source = _layer_rows(num_layers, computed, donors, hits, chosen)
    last = rows[-1] if outputs is None else _outputs_in(rows[-1], outputs)
    source.append(source[-1] if last is rows[-1] else _source(donors, last))
    rows.append(last)
    return Plan(
        num_tokens=num_tokens,
        rows=tuple(rows),
        keep=kept_indices(rows),
        source=tuple(source),
        rows_per_layer=tuple(len(tensor) for tensor in rows),
        token_layer_fraction=_computed_share(rows[:num_layers], reused),
        explanations=tuple(notes),
        jumps=() if records is None else _jumps(prefix, hits, chosen, first_map, first_tail),
        records=tuple(records or ()),
    )


def _jumps(
    prefix: int, hits: Sequence[Span], chosen: Sequence[Sequence[Tensor]], first_map: int, first_tail: int
) -> tuple[Jump, ...]:
    """Return the jumps over an exact prefix and over reused rows, with the donors' maps in order."""
    jumps = [Jump(0, prefix, (first_map,), first_tail)] if prefix else []
    next_map, next_tail = first_map + len(jumps), first_tail + len(jumps)
    for span, rows_of_span in zip(hits, chosen, strict=True):
        cut = len(rows_of_span[0])
        maps = tuple(next_map + index for index, start in enumerate(span.cuts[:-1]) if start >= cut)
        if maps:
            jumps.append(Jump(span.start + cut, span.end, maps, next_tail))
        next_map += len(span.cuts) - 1
        next_tail += 1
    return tuple(jumps)


def _check_spans(spans: Sequence[Span], num_tokens: int) -> None:
    end = 0
    for span in spans:
        if span.length < 1 or span.start < 0 or span.end > num_tokens:
            raise PlanError(f"span [{span.start}, {span.end}) is not inside [0, {num_tokens})")
        if span.start < end:
            raise PlanError(
                f"span [{span.start}, {span.end}) overlaps the span before, or spans are not sorted"
            )
        if span.sample != spans[0].sample:
            raise PlanError(
                f"a plan is for one sample; got spans of samples {spans[0].sample} and {span.sample}"
            )
        end = span.end


def _text(num_tokens: int, spans: Sequence[Span], padding: Tensor | None) -> Tensor:
    """True for tokens that are neither in a span nor padding, bool [num_tokens]."""
    text = torch.ones(num_tokens, dtype=torch.bool)
    if padding is not None:
        text[padding] = False
    for span in spans:
        text[span.start : span.end] = False
    return text


def _checked_outputs(output_rows: Tensor, num_tokens: int) -> Tensor:
    if output_rows.dim() != 1 or output_rows.is_floating_point() or output_rows.dtype == torch.bool:
        raise PlanError("output_rows must be a one-dimensional tensor of integer positions")
    outputs: Tensor = torch.unique(output_rows.to(device="cpu", dtype=torch.int64))  # sorted
    if len(outputs) == 0:
        raise PlanError("output_rows is empty: no output would be left")
    if outputs[0] < 0 or outputs[-1] >= num_tokens:
        raise PlanError(f"output_rows must be inside [0, {num_tokens})")
    return outputs


def _at_least_two(computed: Tensor, hits: Sequence[Span], last_rows: Sequence[Tensor]) -> list[str]:
    """Add rows to ``computed`` until the last layer, the smallest set, has two; return an explanation.

    Adds the neighbour of an active row, or else the last two tokens, which outputs are likely to need.
    """
    active = computed.clone()
    for span, offsets in zip(hits, last_rows, strict=True):
        active[span.start + offsets] = True
    there = active.nonzero().flatten().tolist()
    num_tokens = len(computed)
    if len(there) >= min(2, num_tokens):
        return []
    if there:
        added = [there[0] - 1 if there[0] > 0 else 1]
    else:
        added = list(range(max(0, num_tokens - 2), num_tokens))
    computed[added] = True
    return [f"rows {added} are computed as well: every layer needs at least two"]


def _layer_rows(
    num_layers: int,
    computed: Tensor,
    donors: Tensor,
    hits: Sequence[Span],
    chosen: Sequence[Sequence[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return rows and source of layers 0 to L - 1."""
    rows: list[Tensor] = []
    source: list[Tensor] = []
    before: tuple[int, ...] | None = None
    for layer in range(num_layers):
        offsets = [rows_of_span[layer] for rows_of_span in chosen]
        now = tuple(id(tensor) for tensor in offsets)
        if now == before:
            rows.append(rows[-1])
            source.append(source[-1])
        else:
            active = computed.clone()
            for span, tensor in zip(hits, offsets, strict=True):
                active[span.start + tensor] = True
            rows.append(active.nonzero().flatten())
            source.append(_source(donors, rows[-1]))
            before = now
    return rows, source


def _computed_share(rows: Sequence[Tensor], spans: Sequence[Span]) -> float:
    """Return the computed share of the spans' token-layers."""
    bounds = torch.tensor([(span.start, span.end) for span in spans]).view(-1, 2)
    counts: dict[int, int] = {}  # equal neighbours are one object
    for tensor in rows:
        if id(tensor) not in counts:
            indices = torch.searchsorted(tensor, bounds)
            counts[id(tensor)] = int((indices[:, 1] - indices[:, 0]).sum())
    total = len(rows) * sum(span.length for span in spans)
    return sum(counts[id(tensor)] for tensor in rows) / total if total else 0.0


def _source(donors: Tensor, rows: Tensor) -> Tensor:
    source = donors.clone()
    source[rows] = torch.arange(-1, -len(rows) - 1, -1)
    return source


def _outputs_in(last: Tensor, outputs: Tensor) -> Tensor:
    """Return the rows after the last layer: ``outputs``; a single row gets an active neighbour."""
    if len(outputs) == len(last):
        return last
    if len(outputs) >= 2 or len(last) < 2:
        return outputs
    at = int(torch.searchsorted(last, outputs)[0])
    return last[at - 1 : at + 1] if at > 0 else last[:2]


def kept_indices(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return, per level, the indices of the next level's rows; equal neighbours share their tensor."""
    keep: list[Tensor] = []
    identity: dict[int, Tensor] = {}  # by the id of the rows' tensor
    for before, after in pairwise(rows):
        if after is not before:
            keep.append(torch.searchsorted(before, after))
            continue
        if id(before) not in identity:
            identity[id(before)] = torch.arange(len(before))
        keep.append(identity[id(before)])
    return tuple(keep)
