"""Outcomes of the named families, through both entries."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import vlcache_fx
from vlcache_fx.testing.survey.families import build_family
from vlcache_fx.testing.survey.outcome import ENTRIES, try_family
from vlcache_fx.testing.survey.prompts import image_prompt
from vlcache_fx.testing.survey.table import NAMED

from ...runtime.helpers import own_compiler_state

EVERY_TIME = frozenset({"llava"})
"""Others are in other tests."""

KINDS = {"mllama": "cross-attending decoder"}
"""Of the graph of a call; a decoder's, otherwise."""


NOT_REUSED = {
    "paligemma": ("exact reuse of equal prompts", ""),
    "mllama": ("exact reuse", ""),
}
"""Result and reason of families without reuse; all others reuse rows."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_try_family(name: str, request: pytest.FixtureRequest) -> None:
    if name not in EVERY_TIME and not request.config.getoption("--all-families"):
        pytest.skip("takes half a minute; pass --all-families")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own defaults
        outcome = try_family(name)
    result, detail = NOT_REUSED.get(name, ("reuse", ""))
    assert outcome.results == dict.fromkeys(ENTRIES, result)
    assert outcome.detail == detail


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_gradients_and_explanations(name: str, request: pytest.FixtureRequest) -> None:
    """A training step computes the unmodified model's gradients; explanations trace like calls."""
    if name not in EVERY_TIME and not request.config.getoption("--all-families"):
        pytest.skip("pass --all-families")
    with warnings.catch_warnings(), own_compiler_state():
        warnings.simplefilter("ignore")  # transformers warns of its own defaults
        family = build_family(name)
        prompt = image_prompt(family, 5, 7, image=1)
        compiled = vlcache_fx.compile(copy.deepcopy(family.model), lowering="eager", min_span_tokens=2)
        (explanation,) = compiled.vlcache.explain(**prompt)
        assert explanation.kind == KINDS.get(name, "decoder")
        losses = [model(**prompt, labels=prompt["input_ids"]).loss for model in (compiled, family.model)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    for ours, theirs in zip(compiled.parameters(), family.model.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert "[grad_required]" in compiled.vlcache.last_report["reason"]
