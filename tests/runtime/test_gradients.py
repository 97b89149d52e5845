"""Calls that record gradients run unmodified, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.runtime.gradients import records_gradients
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, own_compiler_state, with_api, with_backend

FIRST = tiny_vlm_inputs(3, 5, [(20, 0)], text_seed=1)
SECOND = tiny_vlm_inputs(13, 4, [(20, 0)], text_seed=2)

PLAIN, WANTED = torch.zeros(2), torch.zeros(2, requires_grad=True)
WEIGHT = nn.Linear(2, 2)
FROZEN = nn.Linear(2, 2).requires_grad_(False)


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@pytest.mark.parametrize(
    ("values", "model", "recorded"),
    [
        ([PLAIN, 3, None, "text"], None, False),
        ([PLAIN], FROZEN, False),
        ([PLAIN], WEIGHT, True),
        ([PLAIN, WANTED], FROZEN, True),
        ([{"image": [PLAIN, (WANTED,)]}], None, True),
        ([SimpleNamespace(self=SimpleNamespace(layers=[SimpleNamespace(keys=WANTED)]))], None, True),
        ([SimpleNamespace(layers=[SimpleNamespace(keys=PLAIN)])], None, False),
    ],
)
def test_records_gradients_searches_containers(
    values: list[Any], model: nn.Module | None, recorded: bool
) -> None:
    assert records_gradients(values, model) is recorded
    with torch.no_grad():
        assert not records_gradients(values, model)
    with torch.inference_mode():
        assert not records_gradients(values, model)


def test_records_gradients_in_forward_mode() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen.append(records_gradients([x]))
        return x * 2

    torch.func.jvp(function, (PLAIN,), (torch.ones(2),))
    assert seen == [True]


def assert_same_gradients(pair: Pair, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    got.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    ours, theirs = dict(pair.model.named_parameters()), dict(pair.reference.named_parameters())
    for name, parameter in theirs.items():
        if parameter.grad is None:
            assert ours[name].grad is None
        else:
            torch.testing.assert_close(ours[name].grad, parameter.grad)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in theirs.values())


def test_training_model_with_grids(caplog: pytest.LogCaptureFixture) -> None:
    """Its encoder is not traced in one graph."""
    pair = with_api(tiny_qwen2_5_vl(2), min_span_tokens=4, policy="full")
    inputs = qwen_inputs(4, 5, [(8, 12, 0)])
    pair.run(**inputs)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        for _ in range(2):
            losses = [
                model(**inputs, labels=inputs["input_ids"]).loss for model in (pair.model, pair.reference)
            ]
            assert_same_gradients(pair, *losses)
    assert pair.report["mode"] == "bypass"
    assert "[grad_required]" in pair.report["reason"]
    assert sum("[grad_required]" in record.message for record in caplog.records) == 1
    pair.run(**qwen_inputs(9, 5, [(8, 12, 0)]))
    assert pair.report["mode"] == "warm"


def test_gradients_of_pixels() -> None:
    pair = with_api(tiny_vlm(last_only=False).requires_grad_(False), policy="full")
    pair.run(**FIRST)
    found = []
    for model in (pair.model, pair.reference):
        pixels = FIRST["pixel_values"].clone().requires_grad_()
        model(**{**FIRST, "pixel_values": pixels}).sum().backward()
        found.append(pixels.grad)
    assert torch.equal(*found)
    assert pair.report["mode"] == "bypass"


@pytest.mark.works("Training", "a frozen model in grad mode")
def test_frozen_model_is_reused_in_grad_mode() -> None:
    pair = with_api(tiny_qwen2_5_vl(2).requires_grad_(False), min_span_tokens=4, policy="full")
    for before, mode in ((4, "cold"), (9, "warm")):
        inputs = qwen_inputs(before, 5, [(8, 12, 0)])
        torch.testing.assert_close(pair.model(**inputs).logits, pair.reference(**inputs).logits)
        assert pair.report["mode"] == mode


def test_gradients_of_values_from_hook() -> None:
    """The value is neither a parameter nor an argument: only the graph shows it."""
    found = []
    pair = with_api(tiny_vlm(last_only=False).requires_grad_(False), policy="full")
    for model in (pair.model, pair.reference):
        steering = torch.ones(16, requires_grad=True)
        model.decoder.layers[0].register_forward_hook(lambda module, args, out, by=steering: out + by)
        model(**FIRST).sum().backward()
        found.append(steering.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.thorough)])
@pytest.mark.works("Training", "training after serving", "gradients are the model's")
def test_training_after_unfreezing(lowering: str) -> None:
    pair = with_backend(tiny_vlm(num_layers=2, last_only=False), policy="full", lowering=lowering)
    for model in (pair.model, pair.reference):
        model.requires_grad_(False)
    for inputs in (FIRST, SECOND):
        torch.testing.assert_close(pair.model(**inputs), pair.reference(**inputs))
    assert pair.report["mode"] == "warm"
    for model in (pair.model, pair.reference):
        model.requires_grad_(True)
    assert_same_gradients(pair, pair.model(**FIRST).sum(), pair.reference(**FIRST).sum())


def test_strict_raises_for_gradients() -> None:
    pair = with_api(tiny_vlm(), strict=True)
    with pytest.raises(UnsupportedGraphError, match="gradients are recorded") as refused:
        pair.model(**FIRST)
    assert refused.value.reason is Reason.GRAD_REQUIRED
