"""Prompts of several requests become one batch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.serve.collate import collate, signature


def prompt(length: int, patches: int = 4, *, with_mask: bool = True) -> dict[str, Tensor]:
    tokens = torch.arange(1, length + 1)[None]
    found = {
        "input_ids": tokens,
        "mm_token_type_ids": torch.ones_like(tokens),
        "cross_attention_mask": torch.ones(1, length, 2),
        "pixel_values": torch.full((patches, 5), float(length)),
        "image_grid_thw": torch.tensor([[1, 2, patches // 2]]),
    }
    return found | ({"attention_mask": torch.ones_like(tokens)} if with_mask else {})


@given(st.lists(st.integers(4, 9), min_size=1, max_size=4), st.booleans())
def test_batch_holds_each_prompt_on_the_right(lengths: list[int], with_mask: bool) -> None:
    prompts = [prompt(length, with_mask=with_mask) for length in lengths]
    batch = collate(prompts, pad_token_id=77)
    for index, length in enumerate(lengths):
        for name in ("input_ids", "mm_token_type_ids", "cross_attention_mask"):
            row = batch[name][index]
            assert torch.equal(row[len(row) - length :], prompts[index][name][0])
            assert (row[: len(row) - length] == (77 if name == "input_ids" else 0)).all()
        if len(lengths) > 1:
            assert int(batch["attention_mask"][index].sum()) == length
    assert batch["pixel_values"].shape == (4 * len(lengths), 5)
    assert batch["image_grid_thw"].shape == (len(lengths), 3)


def test_a_batch_always_has_padding() -> None:
    """So that prompts of one length need no programs of their own."""
    batch = collate([prompt(5), prompt(5)], pad_token_id=77)
    assert batch["input_ids"][:, 0].tolist() == [77, 77]
    assert batch["attention_mask"][:, 0].tolist() == [0, 0]


def test_one_prompt_stays_as_it_is() -> None:
    given = prompt(5, with_mask=False)
    batch = collate([given], pad_token_id=0)
    assert batch.keys() == given.keys()
    assert all(batch[name] is given[name] for name in given)


def test_signature_says_what_may_run_together() -> None:
    assert signature(prompt(5)) == signature(prompt(9, patches=6))
    text = {name: value for name, value in prompt(5).items() if "pixel" not in name}
    assert signature(text) != signature(prompt(5))
    wide = prompt(5) | {"pixel_values": torch.zeros(4, 6)}
    assert signature(wide) != signature(prompt(5))
    half = prompt(5) | {"pixel_values": torch.zeros(4, 5, dtype=torch.float16)}
    assert signature(half) != signature(prompt(5))
    assert signature(prompt(5) | {"sizes": [1, 2]}) is None
