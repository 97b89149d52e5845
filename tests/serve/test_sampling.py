"""Generation configurations for batches of rows."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig

from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.sampling import checked_bias, set_sampling


@pytest.mark.parametrize(
    ("own", "temperature", "expected"),
    [
        ({"do_sample": True, "temperature": 0.7}, None, (True, 0.7)),
        ({"do_sample": False}, None, (False, None)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5}, 0.0, (False, None)),
        ({"do_sample": False}, 1.5, (True, 1.5)),
        ({"do_sample": False}, 1e-40, (True, 0.01)),
    ],
)
def test_temperature(own: dict[str, float], temperature: float | None, expected: object) -> None:
    config = GenerationConfig(**own)
    set_sampling(config, temperature)
    assert (config.do_sample, config.temperature) == expected
    if not config.do_sample:
        assert config.top_k is config.top_p is None


def test_one_row_per_prompt() -> None:
    """Whatever the model's own configuration says."""
    config = GenerationConfig(num_beams=4, num_return_sequences=2, prompt_lookup_num_tokens=3, max_length=9)
    set_sampling(config, None)
    assert (config.num_beams, config.num_return_sequences, config.max_length) == (1, 1, None)
    assert config.prompt_lookup_num_tokens is None


def test_bias() -> None:
    found = checked_bias({"3": 1}, 10)
    assert found == {"3": 1.0}
    assert isinstance(found["3"], float)  # as transformers wants it
    assert checked_bias({}, 10) is None
    for name in ("10", "x", "-1", "1.0", "³", "9" * 5000):
        with pytest.raises(RequestError, match="must be token ids"):
            checked_bias({name: 1.0}, 10)
