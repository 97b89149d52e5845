"""Media spans that the caller marks, for models whose graphs have no recognizable merge."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError

ATTRIBUTE = "_vlcache_spans"


def mark_spans(embeds: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
    """Mark the media spans of ``embeds``; pass the result to the model as its ``inputs_embeds``.

    Args:
        embeds: token embeddings with features merged in, [batch, tokens, hidden].
        spans: ``(sample, start, length)`` of each media item, in tokens.

    Returns:
        ``embeds`` itself. The marks belong to this tensor object: a copy or a slice has none.

    Raises:
        PlanError: a span lies outside the tensor or overlaps another one.
    """
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        raise PlanError(f"embeds must be a tensor of shape [batch, tokens, hidden], got {_shape(embeds)}")
    batch, tokens = embeds.shape[:2]
    ends = dict.fromkeys(range(batch), 0)
    checked = sorted((int(sample), int(start), int(length)) for sample, start, length in spans)
    for sample, start, length in checked:
        if not 0 <= sample < batch or start < 0 or length < 1 or start + length > tokens:
            raise PlanError(
                f"span (sample {sample}, start {start}, length {length}) lies outside"
                f" {batch} x {tokens} tokens"
            )
        if start < ends[sample]:
            raise PlanError(
                f"span (sample {sample}, start {start}, length {length}) overlaps the span before it"
            )
        ends[sample] = start + length
    setattr(embeds, ATTRIBUTE, tuple(checked))
    return embeds


def marked_spans(embeds: Any) -> tuple[tuple[int, int, int], ...]:
    """Return the spans marked on this tensor object; empty where none are."""
    found: tuple[tuple[int, int, int], ...] = getattr(embeds, ATTRIBUTE, ())
    return found


def found_spans(embeds: Tensor, features: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Return the spans of ``embeds`` whose rows are those of an encoder's result.

    For models that merge features outside of every graph, such as in a loop that Dynamo does not trace.

    Args:
        embeds: token embeddings, [batch, tokens, hidden].
        features: the features of each item, [rows, hidden], in the order of the items' tokens.

    Returns:
        ``(sample, start, length)`` of each item that was found, in order.
    """
    found: list[tuple[int, int, int]] = []
    least = (0, 0)
    for item in features:
        length = item.shape[0]
        if not length or item.shape[-1] != embeds.shape[-1]:
            continue
        rows = item.to(embeds)
        for sample, start in (embeds == rows[0]).all(-1).nonzero().tolist():
            part = embeds[sample, start : start + length]
            if (sample, start) >= least and part.shape == rows.shape and torch.equal(part, rows):
                found.append((sample, start, length))
                least = (sample, start + length)
                break
    return tuple(found)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
