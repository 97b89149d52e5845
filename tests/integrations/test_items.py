"""Splitting and joining encoder outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlcache_fx.integrations.items import (
    concat_items,
    feature_fields,
    join_items,
    split_items,
)
from vlcache_fx.testing.prompts import noise


def per_item(*rows: int) -> tuple[Tensor, ...]:
    return tuple(noise(seed, count, 4) for seed, count in enumerate(rows))


ROWS = noise(0, 3, 5, 4)
FORMS: dict[str, Any] = {
    "list": per_item(2, 3, 1),
    "layers": [per_item(2, 3, 1), per_item(4, 1, 2)],
    "rows": ROWS,
}


def same(got: Any, want: Any) -> bool:
    if isinstance(want, Tensor):
        return isinstance(got, Tensor) and torch.equal(got, want)
    return len(got) == len(want) and all(same(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_split_and_join_items(form: str) -> None:
    fields = {"pooler_output": FORMS[form], "deepstack_features": FORMS["layers"]}
    items = split_items(fields, 3)
    assert items is not None
    assert [set(item) for item in items] == [set(fields)] * 3
    joined = join_items(items)
    assert joined is not None
    assert all(same(joined[name], value) for name, value in fields.items())
    turned = join_items(items[::-1])
    assert turned is not None
    assert not same(turned["pooler_output"], FORMS[form])
    assert same(turned["deepstack_features"][1], FORMS["layers"][1][::-1])


@pytest.mark.parametrize(
    "value",
    [
        noise(0, 2, 4),
        torch.tensor(1.0),
        per_item(2, 3),
        (),
        [per_item(2, 3, 1), per_item(2, 3)],
        [per_item(2, 3, 1), noise(0, 3, 4)],
        [("a", "b", "c")],
        3,
    ],
    ids=[
        "other rows", "number", "other count", "empty", "ragged layers", "layer of rows", "no tensors", "int"
    ],
)  # fmt: skip
def test_split_items_of_undivided_fields(value: Any) -> None:
    assert split_items({"pooler_output": value}, 3) is None
    assert split_items({"pooler_output": per_item(2, 3, 1), "more": value}, 3) is None


def test_join_items_of_different_forms() -> None:
    apart = [split_items({"pooler_output": FORMS[form]}, 3) for form in FORMS]
    firsts = [items[0] for items in apart if items is not None]
    assert len(firsts) == 3
    for first in firsts:
        for second in firsts:
            assert (join_items([first, second]) is None) == (first is not second)
    deeper = split_items({"pooler_output": [*FORMS["layers"], per_item(1, 1, 1)]}, 3)
    assert deeper is not None
    assert join_items([firsts[1], deeper[0]]) is None  # another number of layers
    other = split_items({"last_hidden_state": ROWS}, 3)
    assert other is not None
    assert join_items([firsts[2], other[0]]) is None


def test_feature_fields() -> None:
    inner = noise(0, 1, 2, 4)
    output = BaseModelOutputWithPooling(last_hidden_state=inner, pooler_output=ROWS, hidden_states=(inner,))
    assert feature_fields(output) == {"pooler_output": ROWS}
    plain = BaseModelOutputWithPooling(last_hidden_state=inner, hidden_states=(inner,), attentions=(inner,))
    assert feature_fields(plain) == {"last_hidden_state": inner}
    assert feature_fields(BaseModelOutputWithPooling()) is None
    assert feature_fields((ROWS,)) is None


def test_concat_items() -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    output = BaseModelOutputWithDeepstackFeatures(
        pooler_output=per_item(2, 3, 1), last_hidden_state=ROWS, deepstack_features=FORMS["layers"]
    )
    joined = concat_items(output)
    assert type(joined) is type(output)
    assert same(joined.pooler_output, [torch.cat(per_item(2, 3, 1))])
    assert same(joined.deepstack_features, [[torch.cat(part)] for part in FORMS["layers"]])
    assert joined.last_hidden_state is ROWS
    assert same(output.pooler_output, per_item(2, 3, 1))  # unchanged


@pytest.mark.parametrize(
    "features",
    [ROWS, per_item(2), (noise(0, 2, 4), noise(0, 2, 5)), (ROWS, ROWS)],
    ids=["one tensor", "one item", "other widths", "no rows"],
)
def test_concat_items_keeps_other_features(features: Any) -> None:
    output = BaseModelOutputWithPooling(pooler_output=features)
    assert concat_items(output) is output
