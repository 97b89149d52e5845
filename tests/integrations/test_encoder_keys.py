"""Eager encoders: features of an earlier setting are never reused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

from ..runtime.helpers import Pair, own_compiler_state, with_api

GRID = (8, 8, 0)


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def tower(model: Any) -> Any:
    base = model.base_model
    return base.visual if hasattr(base, "visual") else base.vision_tower


def hook(factor: int) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        tower(model).register_forward_hook(
            lambda module, args, output: type(output)(
                **{name: value * factor for name, value in output.items() if isinstance(value, torch.Tensor)}
            )
        )

    return change


def epsilon(model: Any) -> Any:
    norm = next(m for m in tower(model).modules() if hasattr(m, "variance_epsilon") or hasattr(m, "eps"))
    for name in ("variance_epsilon", "eps"):
        if hasattr(norm, name):
            setattr(norm, name, 0.1)


def attention(model: Any) -> Any:
    for module in tower(model).modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"


def feature_layer(model: Any) -> Any:
    model.config.vision_feature_layer = -1


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def check(pair: Pair, inputs: dict[str, Any]) -> Any:
    off, report = pair.run(**inputs)
    assert off == 0.0
    return report["encoder_hit"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(hook(2), marks=pytest.mark.thorough),
        hook(3),
        epsilon,
        pytest.param(attention, marks=pytest.mark.thorough),
    ],
    ids=["2", "3", "epsilon", "attention"],
)
def test_encoder_key_includes_the_encoder(change: Callable[[Any], Any]) -> None:
    pair = with_api(tiny_qwen2_5_vl(1), policy="full")
    assert [check(pair, qwen_inputs(4, 5, [GRID])) for _ in range(2)] == [False, True]
    change(pair.model)
    change(pair.reference)
    assert [check(pair, qwen_inputs(4, 5, [GRID])) for _ in range(2)] == [False, True]


def test_encoder_key_includes_the_feature_layer() -> None:
    model = tiny_llava(1)
    with torch.no_grad():  # installs hooks
        model(**llava_inputs(2, 2, [9]))
    pair = with_api(model, policy="full")
    assert [check(pair, llava_inputs(4, 5, [0])) for _ in range(2)] == [False, True]
    for one in (pair.model, pair.reference):
        feature_layer(one)
    assert [check(pair, llava_inputs(4, 5, [0])) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("state", [autocast, pytest.param(precision, marks=pytest.mark.thorough)])
def test_encoder_key_includes_global_state(state: Callable[[], Any]) -> None:
    pair = with_api(tiny_qwen2_5_vl(1), policy="full")
    inputs = qwen_inputs(4, 5, [GRID])
    assert [check(pair, inputs) for _ in range(2)] == [False, True]
    with state():
        assert [check(pair, inputs) for _ in range(2)] == [False, True]
    assert check(pair, inputs) is True


def test_encoder_cache_skips_training() -> None:
    pair = with_api(tiny_qwen2_5_vl(1), policy="full")
    inputs = qwen_inputs(4, 5, [GRID])
    for one in (pair.model, pair.reference):
        one.train()
    assert [check(pair, inputs) for _ in range(2)] == [None, None]
