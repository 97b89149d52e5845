"""The small programs that run before a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Values: TypeAlias = Callable[..., Sequence[Any]]
"""Takes a graph's inputs, returns values."""


def no_values(*args: Any) -> tuple[Any, ...]:  # noqa: ARG001 (the signature of ``Values``)
    """Return nothing: the program of a graph without such values."""
    return ()


@dataclass(frozen=True)
class Prologue:
    """The programs that read a call of one decoder graph; each takes the graph's inputs.

    With ``torch.compile`` they are parts of the captured graph; an exported folder has a graph for each.

    Attributes:
        spans: returns the mask of each merge and each deepstack add, see ``SpanSpec.features``.
        masks: returns the attention masks, see ``MaskSpec.sites``.
        input_values: returns the other values that enter keys and are not inputs, see ``InputValueSpec``.
        cache_values: returns buffers, positions and sizes of KV caches, see ``KeyMove``. An exported prefill
            begins with an empty cache and has none.
    """

    spans: Values = no_values
    masks: Values = no_values
    input_values: Values = no_values
    cache_values: Values = no_values
