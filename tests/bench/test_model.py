import json
from typing import Any

import pytest
import torch

from vlcache_fx.bench.model import build_model, decoder_size, share_weights
from vlcache_fx.bench.presets import ModelSpec, find_preset
from vlcache_fx.errors import OptionError
from vlcache_fx.testing.families import tiny_llava

CPU = torch.device("cpu")


def tiny() -> Any:
    return build_model(find_preset("tiny"), torch.float32, CPU)


def test_weights_are_the_same_every_time_and_leave_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_copy_shares_its_weights() -> None:
    model = tiny()
    copy = share_weights(model)
    assert copy is not model
    ids = {id(weight) for weight in [*model.parameters(), *model.buffers()]}
    assert {id(weight) for weight in [*copy.parameters(), *copy.buffers()]} == ids


def test_rotary_frequencies_stay_exact_in_other_dtypes() -> None:
    model = build_model(find_preset("tiny"), torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_decoder_is_measured_not_the_tower() -> None:
    model = tiny()  # its vision tower has two blocks as well
    size = decoder_size(model)
    decoder = model.model.language_model.layers
    assert size.layer_weights == sum(weight.numel() for weight in decoder.parameters())
    assert (size.layers, size.hidden, size.heads, size.kv_heads, size.head_dim) == (2, 128, 2, 2, 64)
    assert size.head_weights == 64 * 128
    assert size.kv_bytes_per_token == 2 * 2 * 2 * 64 * 4
    assert not size.experts


def test_another_class_is_built_from_its_configuration() -> None:
    config = json.loads(tiny_llava().config.to_json_string(use_diff=False))
    model = build_model(ModelSpec("x", "LlavaForConditionalGeneration", config), torch.float32, CPU)
    assert decoder_size(model).layers == 3


@pytest.mark.parametrize("name", ["Nothing", "AutoConfig"])
def test_a_class_that_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"model_class='{name}' is not valid"):
        build_model(ModelSpec("x", name, {}), torch.float32, CPU)


def test_a_configuration_of_another_shape_is_refused() -> None:
    spec = ModelSpec("x", "Qwen2_5_VLForConditionalGeneration", {"text_config": {"hidden_size": "large"}})
    with pytest.raises(OptionError, match="refuses the configuration"):
        build_model(spec, torch.float32, CPU)
