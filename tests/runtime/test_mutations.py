"""Inputs that share memory with what is written to."""

from __future__ import annotations

import torch

from vlcache_fx.runtime.mutations import overlapping
from vlcache_fx.spec.mutations import Write


def test_inputs_that_share_memory_are_seen() -> None:
    writes, memory = [Write(0, 0)], torch.zeros(10, 4)
    assert not overlapping(writes, [memory[:5], memory[5:], torch.zeros(3), 7], [0, 1, 2, 3])
    assert overlapping(writes, [memory[:5], memory[4:], torch.zeros(3)], [0, 1, 2])
    assert overlapping(writes, [memory[4:], torch.zeros(3), memory], [0, 1, 2])
    assert overlapping(writes, [memory[:, 2], memory[:, 3]], [0, 1])  # interleaved: near enough
    # Two that are only read may.
    assert not overlapping(writes, [torch.zeros(3), memory, memory[3:]], [0, 1, 2])
    assert not overlapping(writes, [memory[:2], memory, memory[3:]], [0, 2])  # nor is a weight looked at
