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


def test_build_model_is_deterministic_and_keeps_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second = tiny().state_dict(), tiny().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_share_weights() -> None:
    model = tiny()
    copy = share_weights(model)
    assert copy is not model
    ids = {id(weight) for weight in [*model.parameters(), *model.buffers()]}
    assert {id(weight) for weight in [*copy.parameters(), *copy.buffers()]} == ids


def test_build_model_keeps_rotary_frequencies_exact() -> None:
    model = build_model(find_preset("tiny"), torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_decoder_size_without_the_vision_encoder() -> None:
    model = tiny()  # its vision encoder has two layers, too
    size = decoder_size(model)
    decoder = model.model.language_model.layers
    assert size.layer_weights == sum(weight.numel() for weight in decoder.parameters())
    assert (size.layers, size.hidden, size.heads, size.kv_heads, size.head_dim) == (2, 128, 2, 2, 64)
    assert size.head_weights == 64 * 128
    assert size.kv_bytes_per_token == 2 * 2 * 2 * 64 * 4
    assert not size.experts
    assert (size.attention_layers, size.state_bytes) == (2, 0)


def test_decoder_size_of_a_hybrid() -> None:
    """Recurrent layers have no keys and values; the state has two heads of 128 x 128."""
    model = build_model(find_preset("tiny-hybrid"), torch.bfloat16, CPU)
    size = decoder_size(model)
    assert size.has_attention == (False, False, False, True)
    assert size.attention_layers == 1
    assert size.kv_bytes_per_token == 2 * 1 * 2 * 64 * 2
    assert size.state_bytes == 3 * 2 * 128 * 128 * 4
    layers = model.model.language_model.layers
    assert size.weights_of_layers[3] == sum(weight.numel() for weight in layers[3].parameters())
    assert size.weights_of_layers[0] != size.weights_of_layers[3]


def test_build_model_of_another_class() -> None:
    config = json.loads(tiny_llava().config.to_json_string(use_diff=False))
    model = build_model(ModelSpec("x", "LlavaForConditionalGeneration", config), torch.float32, CPU)
    assert decoder_size(model).layers == 3


@pytest.mark.parametrize("name", ["Nothing", "AutoConfig"])
def test_build_model_class_without_config(name: str) -> None:
    with pytest.raises(OptionError, match=f"model_class='{name}' is not valid"):
        build_model(ModelSpec("x", name, {}), torch.float32, CPU)


def test_build_model_bad_configuration() -> None:
    spec = ModelSpec("x", "Qwen2_5_VLForConditionalGeneration", {"text_config": {"hidden_size": "large"}})
    with pytest.raises(OptionError, match="rejects the configuration"):
        build_model(spec, torch.float32, CPU)
