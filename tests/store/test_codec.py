"""Encoder results in store entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vlcache_fx.keys.digest_cache import is_tracked
from vlcache_fx.store import Entry
from vlcache_fx.store.codec import pack, unpack
from vlcache_fx.testing.prompts import noise

PIXELS = noise(0, 4, 3)
DAMAGES: dict[str, Callable[[Entry], Entry]] = {
    "no tensor": lambda entry: replace(entry, tensors={}),
    "other shape": lambda entry: replace(entry, tensors={"0": PIXELS[:2]}),
    "other dtype": lambda entry: replace(entry, tensors={"0": PIXELS.double()}),
    "a donor": lambda entry: replace(entry, info={"kind": "donor", "length": 3}),
    "no device": lambda entry: replace(entry, info={**entry.info, "devices": {}}),
    "no list": lambda entry: replace(entry, info={**entry.info, "results": "all"}),
}


def test_unpack_drops_digests_of_moved_entries() -> None:
    """Device tensors are hashed differently from host tensors."""
    entry = pack([PIXELS.clone()])
    moved = Entry({name: tensor.clone() for name, tensor in entry.tensors.items()}, entry.info)
    assert unpack(moved) is not None
    assert [is_tracked(tensor) for tensor in unpack(moved) or ()] == [False]


def test_unpack_returns_copies_of_packed_values() -> None:
    values = [PIXELS, 3, "text", None, PIXELS.to(torch.bfloat16), True]
    back = unpack(pack(values))
    assert back is not None
    assert [v for v in back if not isinstance(v, Tensor)] == [3, "text", None, True]
    assert torch.equal(back[0], PIXELS)
    assert back[4].dtype is torch.bfloat16
    assert back[0].data_ptr() != PIXELS.data_ptr()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_unpack_returns_none_for_damaged_entries(damage: Callable[[Entry], Entry]) -> None:
    assert unpack(damage(pack([PIXELS]))) is None
