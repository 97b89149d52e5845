"""Splices from packed donors."""

import pytest
import torch

from vlcache_fx.bench.packed_splice import BEFORE, FULL, INSIDE, splices
from vlcache_fx.spec.slots import Key, StoredSlot, Value


@pytest.mark.parametrize("slot", [Key(0), Value(0)], ids=str)
def test_ways_to_splice_agree(slot: StoredSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    found = {name: run() for name, run in splices(slot, 20, 3, 2, 8, torch.float32).items()}
    torch.testing.assert_close(found[BEFORE], found[INSIDE])
    assert torch.equal(found[FULL][:, :3], found[BEFORE][:, :3])  # recomputed
    torch.testing.assert_close(found[FULL], found[BEFORE], atol=0.03, rtol=0)
