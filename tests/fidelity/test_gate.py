"""The gate sets the smallest budget that passes, or turns reuse off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.gate import check
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..runtime.helpers import Pair, own_compiler_state, with_api


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def prompt(image: int, seed: int) -> dict[str, Tensor]:
    return tiny_vlm_inputs(3 + seed, 6, [(24, image)], text_seed=seed)


TRAFFIC = [prompt(image, seed) for seed in range(4) for image in (0, 1)]


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    return with_api(tiny_vlm(num_layers=2), policy="uniform", budget=0.3, shadow=1.0)


@pytest.fixture
def vlm(compiled: Pair) -> Iterator[Pair]:
    compiled.engine.clear()
    compiled.engine.resume()
    compiled.engine.set_budget(0.3)
    return compiled


def test_check_sets_the_smallest_passing_budget(vlm: Pair) -> None:
    runs = vlm.engine.stats()["shadow"]["runs"]
    report = check(vlm.model, iter(TRAFFIC), max_kl=1e-9, budgets=(1.0, 0.0, 0.1))
    assert (report.passed, report.budget) == (True, 1.0)
    assert [trial.budget for trial in report.trials] == [0.0, 0.1, 1.0]
    assert [trial.passed for trial in report.trials] == [False, False, True]
    assert [trial.num_warm for trial in report.trials] == [6, 6, 6]
    none, some, everything = report.trials
    assert none.max_kl >= none.mean_kl > 1e-9
    assert everything.agreement == 1.0
    assert everything.mean_kl < 1e-9
    assert (none.token_layer_fraction, everything.token_layer_fraction) == (0.0, 1.0)
    assert some.token_layer_fraction == pytest.approx(0.1, abs=0.03)
    assert json.loads(json.dumps(report.as_dict()))["trials"][1]["budget"] == 0.1
    assert vlm.engine.options.budget == 1.0
    assert vlm.engine.stats()["shadow"]["runs"] == runs  # shadow runs would hide the effects of reuse
    # The donors of the replay remain.
    assert vlm.run(**prompt(0, 9))[1]["mode"] == "warm"


def test_check_tries_donors_that_learn(vlm: Pair) -> None:
    """Each budget with few exact returns, then with more; what passes is set."""
    before = vlm.engine.options
    try:
        report = check(vlm.model, TRAFFIC, max_kl=1e-9, budgets=(0.1, 1.0), exact_returns=(1, 0))
        tried = [(trial.budget, trial.exact_returns, trial.num_warm) for trial in report.trials]
        assert tried == [(0.1, 0, 6), (0.1, 1, 4), (1.0, 0, 6)]
        assert [trial.donor_contexts for trial in report.trials] == [1.0, 2.0, 1.0]
        assert (report.budget, report.exact_returns) == (1.0, 0)
        learnt = check(vlm.model, TRAFFIC, min_agreement=0.0, budgets=(0.1,), exact_returns=(2,))
        assert (learnt.exact_returns, learnt.trials[0].donor_contexts) == (2, 3.0)
        assert vlm.engine.options.exact_returns == 2
        assert vlm.run(**prompt(0, 9))[1]["spans"][0]["donor_contexts"] == 3
    finally:
        vlm.engine.set_options(before)


def test_check_failed_keeps_the_options(vlm: Pair) -> None:
    before = vlm.engine.options
    assert not check(vlm.model, TRAFFIC, max_kl=1e-9, budgets=(0.0, 0.1), exact_returns=(0, 1, 2)).passed
    assert vlm.engine.options == before


def test_check_needs_more_returns(vlm: Pair) -> None:
    with pytest.raises(OptionError, match=r"first returns are computed.*more often than its exact returns"):
        check(vlm.model, TRAFFIC, exact_returns=(3,))
    assert vlm.engine.options.exact_returns == 0


def test_check_failed_bypasses_the_model(vlm: Pair) -> None:
    report = vlcache_fx.gate(vlm.model, TRAFFIC, max_kl=1e-9, budgets=(0.0, 0.1))
    assert (report.passed, report.budget) == (False, None)
    assert vlm.engine.options.budget == 0.3
    assert len(vlm.engine.store) == 0
    off, called = vlm.run(**prompt(0, 9))
    assert (called["mode"], off) == ("bypass", 0.0)
    assert "no budget of 0, 0.1 passed the gate" in called["reason"]
    # A later gate that passes lifts the bypass.
    assert check(vlm.model, TRAFFIC, min_agreement=0.0, budgets=(0.1,)).passed
    assert vlm.run(**prompt(0, 9))[1]["mode"] == "warm"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "none of the 0 prompts .*there were none"),
        ([prompt(0, 0), prompt(1, 1)], "none of the 2 prompts .*2 cold .*at least one image twice"),
        ([prompt(0, 0)] * 2, r"1 warm\)"),  # the same beginning: exact
    ],
)
def test_check_traffic_without_reuse(vlm: Pair, prompts: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check(vlm.model, prompts)
    assert vlm.engine.options.budget == 0.3


@pytest.mark.parametrize(
    "bad",
    [
        {"min_agreement": 1.1},
        {"max_kl": -1.0},
        {"budgets": ()},
        {"budgets": (0.1, 2)},
        {"exact_returns": ()},
        {"exact_returns": (-1,)},
    ],
    ids=str,
)
def test_check_bad_arguments(vlm: Pair, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=name):
        check(vlm.model, TRAFFIC, **bad)


def test_check_model_without_engine() -> None:
    with pytest.raises(OptionError, match="TinyVlm has no engine"):
        check(tiny_vlm(), TRAFFIC)


def test_check_model_without_logits(vlm: Pair) -> None:
    with pytest.raises(OptionError, match=r"\[batch, tokens, vocabulary\], not \(1, 7\)"):
        check(lambda **_: torch.zeros(1, 7), TRAFFIC, engine=vlm.engine)
