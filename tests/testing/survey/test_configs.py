"""Small values of configurations, by the names of settings."""

from __future__ import annotations

from typing import Any

import pytest

from vlcache_fx.testing.survey.configs import HEADS, KV_HEADS, small_values


@pytest.mark.parametrize(
    ("values", "small"),
    [
        ({"hidden_size": 4096}, {"hidden_size": 64}),
        ({"qk_rope_head_dim": 0}, {"qk_rope_head_dim": 0}),  # no such part
        ({"num_experts": None}, {"num_experts": None}),
        # A list with a value per layer stays one, with a value of each kind.
        ({"num_layers": 4, "intermediate_size": [9, 9, 9, 9]}, {"intermediate_size": [96, 96, 96]}),
        ({"num_layers": 4, "kinds": ["a", "a", "a", "b"]}, {"kinds": ["a", "b", "b"]}),
        # K and V of all heads from one latent: as many heads.
        ({"num_key_value_heads": 8, "kv_lora_rank": 512}, {"num_key_value_heads": HEADS}),
        ({"num_key_value_heads": 8}, {"num_key_value_heads": KV_HEADS}),
        ({"vision_config": {"hidden_size": 1024}}, {"vision_config": {"hidden_size": 32}}),
    ],
)
def test_small_values(values: dict[str, Any], small: dict[str, Any]) -> None:
    assert small_values(values, {}).items() >= small.items()
