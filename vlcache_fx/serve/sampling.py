"""How answers are generated: one row per prompt and one token per step, greedy or sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlcache_fx.serve.errors import bad_request

LOWEST_TEMPERATURE = 0.01
"""Logits divided by less than this may overflow."""

ROW_BY_ROW: Mapping[str, Any] = {
    "max_length": None,
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}
"""What batches of rows need; a model's own generation configuration may say otherwise."""


def set_sampling(config: Any, temperature: float | None) -> None:
    """Prepare a generation configuration for a batch. Temperatures above 0 sample, as in the OpenAI API.

    Args:
        config: the configuration, which is changed.
        temperature: that of the request; None for what the model's configuration says.
    """
    for name, value in ROW_BY_ROW.items():
        setattr(config, name, value)
    if temperature is not None:
        config.do_sample = temperature > 0
        config.temperature = max(temperature, LOWEST_TEMPERATURE)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None


def checked_bias(bias: Mapping[str, float], vocabulary: int | None) -> dict[str, float] | None:
    """The field ``logit_bias``; None where it is empty.

    Raises:
        RequestError: a name is no token id of the model.
    """
    for name in bias:
        is_number = name.isascii() and name.isdecimal() and len(name) < 10
        if not is_number or (vocabulary is not None and int(name) >= vocabulary):
            raise bad_request(f"logit_bias has {name[:20]!r}: its names must be token ids", "logit_bias")
    return {name: float(value) for name, value in bias.items()} or None
