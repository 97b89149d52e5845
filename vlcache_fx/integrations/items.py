"""Encoder outputs item by item: taken apart, put together, and written as one line of text and tensors.

An output is an object of the transformers library whose fields hold features. What models do with several
items differs: a tensor per item, one tensor with an item per row, or per depth of the encoder a tensor per
item (features that enter several decoder layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlcache_fx.keys.digest_cache import join_rows

Fields: TypeAlias = dict[str, Any]
"""Fields of an output: tensors, and lists of them."""

POOLED = "pooler_output"
INNER = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""What encoders return beside their result, and what decoders read only where there is no pooled output."""

LIST, LAYERS, ROWS = "list", "layers", "rows"


def feature_fields(output: Any) -> Fields | None:
    """The fields that a decoder may read; None for something that is no output of the library."""
    if not isinstance(output, Mapping):
        return None
    fields = {name: value for name, value in output.items() if value is not None}
    if POOLED in fields:
        fields = {name: value for name, value in fields.items() if name not in INNER}
    else:
        fields.pop("hidden_states", None)
        fields.pop("attentions", None)
    return fields or None


def split_items(fields: Fields, count: int) -> list[Fields] | None:
    """One mapping per item, each field with how it was held; None where a field does not tell items apart."""
    items: list[Fields] = [{} for _ in range(count)]
    for name, value in fields.items():
        form = _form(value, count)
        if form is None:
            return None
        for index, item in enumerate(items):
            match form:
                case "list":
                    part = [value[index]]
                case "layers":
                    part = [layer[index] for layer in value]
                case _:
                    part = [value[index : index + 1]]
            item[name] = (form, part)
    return items


def join_items(items: Sequence[Fields]) -> Fields | None:
    """The fields of an output that holds all items; None where they do not fit together."""
    forms = [{name: (form, len(parts)) for name, (form, parts) in item.items()} for item in items]
    if any(form != forms[0] for form in forms):
        return None
    fields: Fields = {}
    for name, (form, parts) in items[0].items():
        together = [item[name][1] for item in items]
        match form:
            case "list":
                fields[name] = tuple(parts[0] for parts in together)
            case "layers":
                fields[name] = [tuple(parts[depth] for parts in together) for depth in range(len(parts))]
            case _:
                fields[name] = torch.cat([parts[0] for parts in together])
    return fields


def _form(value: Any, count: int) -> str | None:
    if isinstance(value, Tensor):
        return ROWS if value.dim() > 0 and value.shape[0] == count else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(part, Tensor) for part in value):
        return LIST if len(value) == count else None
    per_layer = all(isinstance(part, list | tuple) and len(part) == count for part in value)
    return LAYERS if per_layer and all(isinstance(one, Tensor) for part in value for one in part) else None


def concat_items(output: Any) -> Any:
    """``output`` with the features of all items as one tensor each, whatever number of items they come from.

    Models concatenate them first thing; inside a graph, every number of items would be compiled anew.
    """
    fields = feature_fields(output)
    if fields is None:
        return output
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if _are_rows(value):
            changed[name] = (join_rows(value),)
        elif isinstance(value, list | tuple) and value and all(_are_rows(part) for part in value):
            changed[name] = [(join_rows(part),) for part in value]
    return type(output)(**{**dict(output.items()), **changed}) if changed else output


def _are_rows(value: Any) -> bool:
    """True for two or more items' features, [rows, width] each."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 1
        and all(isinstance(one, Tensor) and one.dim() == 2 for one in value)
        and len({one.shape[1] for one in value}) == 1
    )
