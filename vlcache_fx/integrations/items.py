"""Encoder outputs split into media items, and joined.

An output is a ``ModelOutput`` of the transformers library whose fields contain features. Models represent
several items in one of three forms:

    list    (a, b)              a tensor per item
    layers  [(a, b), (c, d)]    per encoder depth, a tensor per item (deepstack)
    rows    [items, ...]        one tensor with an item per row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlcache_fx.keys.digest_cache import join_rows

Fields: TypeAlias = dict[str, Any]
"""Fields of an output: tensors, and nested lists of tensors."""

POOLED = "pooler_output"
INTERMEDIATE_FIELDS = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""Fields that decoders do not read if there is a pooled output."""

LIST, LAYERS, ROWS = "list", "layers", "rows"


def feature_fields(output: Any) -> Fields | None:
    """Return the fields that a decoder may read, or None for an object without such fields."""
    if not isinstance(output, Mapping):
        return None
    fields = {name: value for name, value in output.items() if value is not None}
    if POOLED in fields:
        fields = {name: value for name, value in fields.items() if name not in INTERMEDIATE_FIELDS}
    else:
        fields.pop("hidden_states", None)
        fields.pop("attentions", None)
    return fields or None


def split_items(fields: Fields, count: int) -> list[Fields] | None:
    """Return ``{name: (form, parts)}`` per item, or None if a field cannot be split into ``count`` items."""
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
    """Undo ``split_items``; return None if the items have different fields or forms."""
    forms = [{name: (form, len(parts)) for name, (form, parts) in item.items()} for item in items]
    if any(form != forms[0] for form in forms):
        return None
    fields: Fields = {}
    for name, (form, parts) in items[0].items():
        per_item = [item[name][1] for item in items]
        match form:
            case "list":
                fields[name] = tuple(parts[0] for parts in per_item)
            case "layers":
                fields[name] = [tuple(parts[depth] for parts in per_item) for depth in range(len(parts))]
            case _:
                fields[name] = torch.cat([parts[0] for parts in per_item])
    return fields


def _form(value: Any, count: int) -> str | None:
    if isinstance(value, Tensor):
        return ROWS if value.dim() > 0 and value.shape[0] == count else None
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(part, Tensor) for part in value):
        return LIST if len(value) == count else None
    per_layer = all(isinstance(part, list | tuple) and len(part) == count for part in value)
    are_tensors = per_layer and all(isinstance(tensor, Tensor) for part in value for tensor in part)
    return LAYERS if are_tensors else None


def concat_items(output: Any) -> Any:
    """Return ``output`` with the features of all items concatenated to one tensor per field and depth.

    Models start by concatenating them; within the graph, each number of items would be compiled separately.
    """
    fields = feature_fields(output)
    if fields is None:
        return output
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if _are_items(value):
            changed[name] = (join_rows(value),)
        elif isinstance(value, list | tuple) and value and all(_are_items(part) for part in value):
            changed[name] = [(join_rows(part),) for part in value]
    return type(output)(**{**dict(output.items()), **changed}) if changed else output


def _are_items(value: Any) -> bool:
    """Return whether ``value`` contains the features of two or more items, [rows, width] each."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 1
        and all(isinstance(tensor, Tensor) and tensor.dim() == 2 for tensor in value)
        and len({tensor.shape[1] for tensor in value}) == 1
    )
