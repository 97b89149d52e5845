import json
from pathlib import Path

import pytest
import torch
import transformers

from vlcache_fx.bench.presets import PRESETS, ModelSpec, find_preset, read_spec
from vlcache_fx.errors import OptionError


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())
def test_presets_are_valid_configurations(spec: ModelSpec) -> None:
    model_class = getattr(transformers, spec.model_class)
    for one in (spec, spec.with_feature_tower()):
        config = model_class.config_class.from_dict(dict(one.config))
        text = config.get_text_config()
        assert text.num_hidden_layers == spec.config["text_config"]["num_hidden_layers"]
        assert config.vision_config.out_hidden_size == text.hidden_size


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-vl-3b", 3.75),
        ("qwen2.5-vl-7b", 8.29),
        ("qwen3-vl-8b", 8.77),
        ("qwen3.5-4b", 4.54),
        ("qwen3.5-9b", 9.41),
        ("cpu-hybrid", 0.15),
    ],
)
def test_presets_number_of_weights(name: str, billions: float) -> None:
    spec = find_preset(name)
    model_class = getattr(transformers, spec.model_class)
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(dict(spec.config)))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_with_layers_keeps_the_preset() -> None:
    spec = find_preset("qwen3-vl-8b")
    assert spec.with_layers(2).config["text_config"]["num_hidden_layers"] == 2
    assert spec.with_layers(None) is spec
    assert spec.config["text_config"]["num_hidden_layers"] == 36
    with pytest.raises(OptionError, match="layers=0"):
        spec.with_layers(0)


def test_with_layers_cuts_layer_types() -> None:
    spec = ModelSpec("x", "X", {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]})
    assert spec.with_layers(2).config == {"num_hidden_layers": 2, "layer_types": ["a", "b"]}


def test_with_layers_repeats_the_pattern() -> None:
    kinds = ["a", "a", "b", "a", "a", "b", "a"]
    spec = ModelSpec("x", "X", {"num_hidden_layers": 7, "layer_types": kinds})
    assert spec.with_layers(9).config["layer_types"] == ["a", "a", "b"] * 3
    other = ModelSpec("x", "X", {"num_hidden_layers": 2, "layer_types": ["a", "b"]})
    assert other.with_layers(3).config["layer_types"] == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["cpu-hybrid", "qwen3.5-4b", "qwen3.5-9b"])
def test_with_layers_keeps_one_attention_layer_in_four(name: str) -> None:
    spec = find_preset(name).with_layers(12)
    model_class = getattr(transformers, spec.model_class)
    text = model_class.config_class.from_dict(dict(spec.config)).get_text_config()
    assert text.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 3


def test_find_preset_unknown() -> None:
    with pytest.raises(
        OptionError,
        match=r"preset='gpt' is not valid.*tiny, cpu, cpu-28, tiny-hybrid, cpu-hybrid, qwen2\.5-vl-3b",
    ):
        find_preset("gpt")


def test_read_spec_class(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["A"], "hidden_size": 8}))
    assert read_spec(path).model_class == "A"
    assert read_spec(path, "B").model_class == "B"
    assert read_spec(path).config["hidden_size"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "JSON object, not list"), ("{}", "names no architecture")],
)
def test_read_spec_unusable_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_spec(path)


def test_read_spec_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_spec(tmp_path / "nowhere.json")
