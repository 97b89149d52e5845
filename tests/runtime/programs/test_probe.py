"""Probes: deviations equal those from the rows of an exact run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.policies import Deviation, Policy, ProbedSpan, ProbingPolicy, SpanContext
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ...models import batch_of, padded, wired
from ..helpers import Pair, hits, with_backend

LAYERS = 3
seen: list[Deviation] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


@dataclass(frozen=True)
class Looking(ProbingPolicy):
    """Records deviations, and chooses the row with the largest, from layer 0 on."""

    name: ClassVar[str] = "looking"

    probe_layer: int = 1

    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        seen.append(span.deviation)
        return (span.deviation.value.argmax().reshape(1),) * span.num_layers


def prompt(*images: int, before: int = 5, text: int = 0) -> dict[str, Tensor]:
    """Images of 16 tokens and more, by seed."""
    return tiny_vlm_inputs(before, 6, [(16 + seed, seed) for seed in images], text_seed=text)


@contextmanager
def asking(pair: Pair, policy: Any, budget: float = 0.1) -> Iterator[None]:
    with pair.engine.using(policy=policy, budget=budget):
        yield


def stored(pair: Pair, spans: slice) -> list[dict[str, Tensor]]:
    """Return the stored donors of these spans of the last call."""
    entries = [pair.engine.store.get(span["key"]) for span in pair.report["spans"][spans]]
    assert all(entry is not None for entry in entries)
    return [dict(entry.tensors) for entry in entries if entry is not None]


def check_seen(pair: Pair, call: dict[str, Tensor], layer: int, spans: slice = slice(None)) -> None:
    """Check that deviations of the last call are distances between donors and rows of an exact run."""
    donors = stored(pair, spans)
    pair.engine.clear()
    pair.run(**call)
    assert pair.report["mode"] == "cold"
    for found, donor, other in zip(seen, donors, stored(pair, spans), strict=True):
        assert found.layer == layer
        for got, slot in ((found.key, f"{layer}.k"), (found.value, f"{layer}.v")):
            expected = (donor[slot].double() - other[slot].double()).pow(2).sum((0, 2))  # [1, tokens, width]
            assert float(expected.max()) > 1e-3
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def model(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False))


@pytest.fixture
def pair(model: Pair) -> Pair:
    model.engine.clear()
    return model


@pytest.mark.parametrize("layer", [1, 2])
def test_probe_several_spans_with_miss(pair: Pair, layer: int) -> None:
    for image in (0, 1):
        pair.run(**prompt(image))
    call = prompt(0, 2, 1, before=9, text=1)
    with asking(pair, Looking(layer)):
        _, report = pair.run(**call)
    assert (report["mode"], hits(report)) == ("warm", [True, False, True])
    assert [len(found.key) for found in seen] == [16, 17]
    # The warm run computes all rows but those of the two spans, and one row of each span.
    tokens = report["num_tokens"]
    assert report["rows_per_layer"] == (tokens - 16 - 17 + 2,) * (LAYERS + 1)
    assert report["token_layer_fraction"] == pytest.approx(2 / (16 + 17))
    assert report["timings_ms"]["probe"] > 0
    assert report["explanations"] == ()
    check_seen(pair, call, layer, slice(None, None, 2))


def test_probe_after_exact_prefix(pair: Pair) -> None:
    pair.run(**prompt(0))
    pair.run(**prompt(1, text=1))
    call = prompt(0, 1, text=0)  # shares the prefix of the first call
    with asking(pair, Looking()):
        _, report = pair.run(**call)
    assert report["mode"] == "warm"
    assert report["prefix_tokens"] >= 5 + 16
    check_seen(pair, call, 1, slice(1, None))


def test_no_probe_for_exact_reuse(pair: Pair) -> None:
    for _ in range(2):
        with asking(pair, Looking()):
            _, report = pair.run(**prompt(0))
    assert report["mode"] == "warm"
    assert report["prefix_tokens"] == report["num_tokens"]
    assert "probe" not in report["timings_ms"]
    assert not seen


def test_layer_0_has_no_deviation(pair: Pair) -> None:
    pair.run(**prompt(0))
    with asking(pair, Looking(0)):
        pair.run(**prompt(0, before=9, text=1))
    (found,) = seen
    assert float(found.key.max()) < 1e-8
    assert float(found.value.max()) < 1e-8


def test_cacheblend_rows_per_layer(pair: Pair) -> None:
    pair.run(**prompt(0))
    with asking(pair, "cacheblend", 0.125):
        off, report = pair.run(**prompt(0, before=9, text=1))
    tokens = report["num_tokens"]
    assert report["rows_per_layer"] == (tokens, tokens, *(tokens - 16 + 2,) * (LAYERS - 1))
    assert report["token_layer_fraction"] == pytest.approx((2 + (LAYERS - 2) * 0.125) / LAYERS)
    assert off > 1e-3
    with asking(pair, "cacheblend", 1.0):
        off, report = pair.run(**prompt(0, before=7, text=2))
    assert report["token_layer_fraction"] == 1.0
    assert off < 1e-5


@dataclass(frozen=True)
class Row(Policy):
    """Chooses one fixed row of every span."""

    name: ClassVar[str] = "row"
    ignores_budget: ClassVar[bool] = True

    row: int

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return (torch.tensor([self.row]),) * span.num_layers


def test_probe_does_not_change_results() -> None:
    """A probe changes no state. Here results need only the last row."""
    pair = with_backend(tiny_vlm(num_layers=2))
    pair.run(**prompt(0))
    call = prompt(0, before=9, text=1)
    with asking(pair, Looking()), torch.no_grad():
        answer, rows = pair.model(**call), pair.report["rows_per_layer"]
    (found,) = seen
    with asking(pair, Row(int(found.value.argmax()))), torch.no_grad():
        assert torch.equal(pair.model(**call), answer)
    assert pair.report["mode"] == "warm"
    assert pair.report["rows_per_layer"] == rows
    check_seen(pair, call, 1)


@pytest.fixture(scope="module")
def batch(_compiler: None) -> Pair:
    return with_backend(padded(num_layers=2, last_only=False, counted=True))


@pytest.mark.parametrize("left", [True, False])
def test_probe_of_batch(batch: Pair, left: bool) -> None:
    batch.engine.clear()
    batch.run(**batch_of(prompt(0, 2), prompt(1, before=3, text=1), left=left))
    call = batch_of(prompt(1, 0, before=4, text=2), prompt(2, before=11, text=3), left=left)
    with asking(batch, Looking()):
        _, report = batch.run(**call)
    assert (report["mode"], hits(report)) == ("warm", [True, True, True])
    assert [len(found.key) for found in seen] == [17, 16, 18]
    check_seen(batch, call, 1)


def test_probe_of_layer_that_shares_keys() -> None:
    pair = with_backend(wired("shared", last_only=False))
    pair.run(**prompt(0))
    with asking(pair, Looking(2)):
        pair.run(**prompt(0, before=9, text=1))
    assert [found.layer for found in seen] == [1]


class Half(Looking):
    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return super().select(replace(span, length=span.length // 2))


class Short(Looking):
    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        return super().choose(span)[1:]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Looking(LAYERS), "policy 'looking' probes layer 3; the model has layers 0 to 2"),
        (Half(), "select must return all 16 rows of a span up to layer 1, not 8"),
        (Short(), "chose rows for 2 layers; the model has 3"),
    ],
)
def test_invalid_probe_plan_costs_reuse_only(
    pair: Pair, policy: Policy, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair.run(**prompt(0))
    with asking(pair, policy), caplog.at_level(logging.WARNING, "vlcache_fx"):
        off, report = pair.run(**prompt(0, before=9, text=1))
    assert (off, report["mode"], report["reason"]) == (0.0, "bypass", "the policy's rows make no plan")
    assert message in caplog.text
