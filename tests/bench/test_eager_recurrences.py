"""Recurrent modules that ``torch.compile`` leaves to eager execution."""

from typing import Any

import pytest
import torch

from vlcache_fx.bench.eager_recurrences import recurrent_modules, with_eager_recurrences
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.systems import Systems, Variant

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(find_preset("tiny-hybrid"), torch.float32, CPU)


def test_recurrent_modules(model: Any) -> None:
    layers = model.model.language_model.layers
    assert recurrent_modules(model) == [layer.linear_attn for layer in layers[:3]]
    assert recurrent_modules(build_model(find_preset("tiny"), torch.float32, CPU)) == []


def test_copy_leaves_the_model_alone(model: Any) -> None:
    copied = with_eager_recurrences(model)
    first, own = recurrent_modules(model)[0], recurrent_modules(copied)[0]
    assert "forward" in vars(own)
    assert "forward" not in vars(first)
    assert own.in_proj_z.weight is first.in_proj_z.weight


def test_systems_of_decoders_without_recurrences_compile_once(model: Any) -> None:
    tiny = Systems(build_model(find_preset("tiny"), torch.float32, CPU), "eager", [Variant()])
    assert tiny.compiled_long is tiny.compiled
    assert not tiny.eager_recurrences
    hybrid = Systems(model, "eager", [Variant()])
    assert hybrid.compiled_long is not hybrid.compiled
    assert hybrid.eager_recurrences
