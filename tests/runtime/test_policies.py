"""Invalid choices of policies: repaired and explained, or raised in strict mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.policies import Policy, SpanContext
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, settings_of, with_backend

LAYERS, SPAN = 3, 40
Choice = Callable[[int], list[Tensor]]


@dataclass(frozen=True)
class Asked(Policy):
    """Chooses rows with a function of the span's length."""

    name: ClassVar[str] = "asked"

    choice: Choice

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.choice(span.length)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.fixture(scope="module")
def pair(_compiler: None) -> Pair:
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False))
    pair.run(**tiny_vlm_inputs(5, 6, [(SPAN, 0)]))
    return pair


def run(pair: Pair, choice: Choice, *, strict: bool = False) -> dict[str, Any]:
    """Return the report of a call after another text; the budget pays for four rows."""
    with settings_of(pair.engine, strict=strict), pair.engine.using(policy=Asked(choice), budget=0.1):
        return pair.run(**tiny_vlm_inputs(9, 6, [(SPAN, 0)], text_seed=1))[1]


REPAIRS: dict[str, tuple[Choice, list[int], str]] = {
    "not nested": (
        lambda n: [ids(0, 1), ids(0), ids(0, 1)],
        [2, 1, 1],
        "dropped rows that were not computed in the layer before (layer 2); row sets must shrink with depth",
    ),
    "outside the span": (
        lambda n: [ids(-1, 0, n), ids(0), ids(0)],
        [1, 1, 1],
        "dropped rows outside the span (layer 0)",
    ),
    "over the budget": (
        lambda n: [torch.arange(6)] * LAYERS,
        [4, 4, 4],
        "the policy asked for 18 token-layers, the budget allows 12; dropped the latest rows, 12 are left",
    ),
    "not sorted": (
        lambda n: [ids(3, 1, 1)] * LAYERS,
        [2, 2, 2],
        "rows were not sorted or not unique (3 layers, the first is 0)",
    ),
}


@pytest.mark.parametrize("what", REPAIRS)
def test_repair_is_explained_or_raised(pair: Pair, what: str) -> None:
    choice, rows, explanation = REPAIRS[what]
    report = run(pair, choice)
    assert report["mode"] == "warm"
    assert report["explanations"] == (f"span [9, {9 + SPAN}): {explanation}",)
    assert report["rows_per_layer"][:LAYERS] == tuple(9 + 6 + count for count in rows)
    assert report["token_layer_fraction"] == pytest.approx(sum(rows) / (SPAN * LAYERS))
    with pytest.raises(PlanError) as raised:
        run(pair, choice, strict=True)
    assert explanation in str(raised.value)


def test_valid_choice_is_not_repaired(pair: Pair) -> None:
    for strict in (False, True):
        report = run(pair, lambda n: [ids(0, 2, 5), ids(0, 5), ids(5)], strict=strict)
        assert report["explanations"] == ()
        assert report["rows_per_layer"][:LAYERS] == (18, 17, 16)


def test_choice_for_other_model_costs_reuse_only(pair: Pair) -> None:
    failures = pair.engine.stats()["plan_failures"]
    report = run(pair, lambda n: [ids(0)] * (LAYERS - 1))
    assert (report["mode"], report["reason"]) == ("bypass", "the policy's rows make no plan")
    assert pair.engine.stats()["plan_failures"] == failures + 1
    with pytest.raises(PlanError, match="chose rows for 2 layers; the model has 3"):
        run(pair, lambda n: [ids(0)] * (LAYERS - 1), strict=True)
