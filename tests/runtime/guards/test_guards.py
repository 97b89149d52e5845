"""Guards: requests for shadow runs, violations and bypass."""

from __future__ import annotations

import logging

import pytest

from vlcache_fx.options import Options
from vlcache_fx.runtime.guards.guards import Guards
from vlcache_fx.runtime.guards.shadow import Comparison

GOOD, FLIP, FAR, BROKEN = (
    Comparison(0.01, False),
    Comparison(0.02, True),
    Comparison(0.3, False),
    Comparison(float("nan"), False),
)


@pytest.mark.parametrize(
    ("share", "due"), [(0.1, [9, 19, 29]), (1 / 3, [2, 5, 8]), (1.0, [0, 1, 2]), (0, [])]
)
def test_is_due_adds_up_shares(share: float, due: list[int]) -> None:
    guards = Guards(Options(shadow=share))
    found = [call for call in range(30) if guards.is_due("model")]
    assert found[:3] == due
    assert len(found) == round(30 * share)


def test_is_due_per_model() -> None:
    guards = Guards(Options(shadow=0.5))
    found = [model for _ in range(4) for model in ("one", "two") if guards.is_due(model)]
    assert found == ["one", "two", "one", "two"]


def test_too_many_violations_bypass_one_model(caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(Options(shadow=1.0, shadow_max_kl=0.1, shadow_max_violations=2))
    with caplog.at_level(logging.WARNING, logger="vlcache_fx"):
        for comparison in (GOOD, FLIP, GOOD):
            guards.record("one", comparison)
        guards.record("two", FAR)
        assert guards.reason("one") is None
        for _ in range(3):
            guards.record("one", FAR)
    reason = guards.reason("one")
    assert reason is not None
    assert "2 shadow runs" in reason
    assert "0.1" in reason
    assert len(caplog.records) == 1
    assert guards.reason("two") is None
    with guards.off():
        assert guards.reason("one") is None
        assert not guards.is_due("two")
    stats = guards.stats()
    assert stats["mean_kl"] == pytest.approx((0.01 + 0.02 + 0.01 + 4 * 0.3) / 7)
    assert (stats["runs"], stats["max_kl"], stats["flips"], stats["violations"]) == (7, 0.3, 1, 5)
    assert stats["bypassed_models"] == 1
    guards.resume()
    assert guards.reason("one") is None
    guards.record("one", FAR)
    assert guards.reason("one") is None  # the count restarts


def test_violations_without_max_kl() -> None:
    guards = Guards(Options(shadow=1.0, shadow_max_kl=None, shadow_max_violations=1))
    guards.record("model", FAR)
    assert guards.reason("model") is None
    guards.record("model", FLIP)
    assert guards.reason("model") is not None


def test_nan_logits_are_a_violation() -> None:
    guards = Guards(Options(shadow=1.0, shadow_max_violations=1))
    guards.record("model", BROKEN)
    assert guards.reason("model") is not None
    assert guards.stats()["mean_kl"] == 0.0


def test_resume_of_models() -> None:
    guards = Guards(Options())
    for model in ("one", "two"):
        guards.bypass(model, "because")
    guards.resume(["one", "never seen"])
    assert (guards.reason("one"), guards.reason("two")) == (None, "because")
