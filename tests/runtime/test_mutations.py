"""Mutated inputs that share memory with others."""

from __future__ import annotations

import torch

from vlcache_fx.runtime.mutations import overlapping
from vlcache_fx.spec.mutations import Write


def test_overlapping() -> None:
    writes, memory = [Write(0, 0)], torch.zeros(10, 4)
    assert not overlapping(writes, [memory[:5], memory[5:], torch.zeros(3), 7], [0, 1, 2, 3])
    assert overlapping(writes, [memory[:5], memory[4:], torch.zeros(3)], [0, 1, 2])
    assert overlapping(writes, [memory[4:], torch.zeros(3), memory], [0, 1, 2])
    assert overlapping(writes, [memory[:, 2], memory[:, 3]], [0, 1])  # interleaved counts as overlap
    # Inputs that are only read may overlap.
    assert not overlapping(writes, [torch.zeros(3), memory, memory[3:]], [0, 1, 2])
    assert not overlapping(writes, [memory[:2], memory, memory[3:]], [0, 2])  # weights are not checked
