"""Weights that torchao quantised: answers are those of the quantised model, or the reason says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.errors import Reason
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

from ..runtime.helpers import Pair, own_compiler_state

pytest.importorskip("torchao", reason="needs torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # from torchao and its imports

GROUP = 32


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_activations() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int4_unpacked() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP))


def int4_packed() -> Any:
    """Packed for the kernel of CPUs: only that kernel can read the bytes."""
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(GROUP, set_inductor_config=False)


CONFIGS: dict[str, Callable[[], Any]] = {
    "int8": int8,
    "int8 activations": int8_activations,
    "int4": int4_unpacked,
    "int4 packed": int4_packed,
}


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def quantised(config: Any) -> Any:
    from torchao.quantization import quantize_

    model = tiny_qwen2_5_vl(1)
    quantize_(model.model.language_model, config)
    kinds = {type(weight).__name__ for weight in model.model.language_model.parameters()}
    assert kinds - {"Parameter"}, "something is quantised"
    return model


def compiled(config: Any, **options: Any) -> Pair:
    reference = quantised(config)
    model = vlcache_fx.compile(copy.deepcopy(reference), policy="full", **options)
    return Pair(model, reference, model.vlcache)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.works("Quantisation", f"torchao, {name} weights"))
        for name in ("int8", "int4", "int4 packed")
    ],
)
def test_answers_are_those_of_the_quantised_model(name: str, lowering: str) -> None:
    pair = compiled(CONFIGS[name](), lowering=lowering)
    modes = []
    for seed in range(3):
        error, report = pair.run(**qwen_inputs(3, 4, [(8, 8, 0)], seed))
        assert error < 1e-4
        modes.append(report["mode"])
    assert modes == ["cold", "warm", "warm"]


@pytest.mark.works("Quantisation", "torchao, int8 activations", "runs unmodified (`unknown_op`)")
def test_quantised_activations_are_refused() -> None:
    """How torchao quantises them is not known to work token by token."""
    pair = compiled(int8_activations(), lowering="eager")
    error, report = pair.run(**qwen_inputs(3, 4, [(8, 8, 0)], 0))
    assert error == 0
    assert (report["mode"], report["reason_code"]) == ("bypass", Reason.UNKNOWN_OP)
    assert "choose_qparams_affine" in report["reason"]


SCALES = {"int8": "scale", "int4": "scale", "int4 packed": "scale_and_zero"}


@pytest.mark.parametrize("name", SCALES)
def test_other_scales_are_other_weights(name: str) -> None:
    pair = compiled(CONFIGS[name](), lowering="eager")
    pair.run(**qwen_inputs(3, 4, [(8, 8, 0)], 0))
    for model in (pair.model, pair.reference):
        with torch.no_grad():
            weight = model.model.language_model.layers[0].self_attn.k_proj.weight
            getattr(weight, SCALES[name]).mul_(1.5)
    modes = []
    for seed in (1, 2):
        error, report = pair.run(**qwen_inputs(3, 4, [(8, 8, 0)], seed))
        assert error < 1e-4
        modes.append(report["mode"])
    assert modes == ["cold", "warm"]
