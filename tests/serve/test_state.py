"""Which requests may run together."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from vlcache_fx.serve.request import RequestSettings
from vlcache_fx.serve.state import group_of

INPUTS = {
    "input_ids": torch.zeros(1, 4, dtype=torch.long),
    "attention_mask": torch.ones(1, 4, dtype=torch.long),
}


def test_biases_of_tokens_are_part_of_the_group() -> None:
    """transformers names them by tuples of tokens."""
    settings = RequestSettings()
    groups = [
        group_of(INPUTS, GenerationConfig(sequence_bias=bias, max_new_tokens=length), settings)
        for bias, length in ((None, 4), ({(1,): -100.0}, 4), ({(1,): -100.0}, 8), ({(2,): -100.0}, 4))
    ]
    assert groups[1] == groups[2]
    assert len(set(groups)) == 3
