"""The small programs that run before a decoder does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Values: TypeAlias = Callable[..., Sequence[Any]]
"""Takes a graph's inputs, gives values."""


def no_values(*args: Any) -> tuple[Any, ...]:  # noqa: ARG001 (a form that others need)
    """The program of a graph that has nothing to tell."""
    return ()


@dataclass(frozen=True)
class Prologue:
    """Tells what a call of one decoder graph holds: named programs, each from the graph's inputs to values.

    On the torch path they are parts of the captured graph; an exported folder has a graph of each name.

    Attributes:
        spans: which tokens are media: the mask of each merge and addition, see ``SpanSpec.features``.
        masks: what tokens may see: the masks of attentions that have one, see ``MaskSpec.sites``.
        input_values: what keys hold beside these, as far as it is no input: see ``InputValueSpec.input``.
        cache_values: where keys of earlier calls lie among those of this one: see ``KeyMove``. An exported
            prefill begins with an empty cache and has none.
    """

    spans: Values = no_values
    masks: Values = no_values
    input_values: Values = no_values
    cache_values: Values = no_values
