"""A mask of padding that ``forward`` of a hybrid decoder multiplies with the inputs of recurrent layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

import vlcache_fx
from vlcache_fx.testing.survey.families import build_family
from vlcache_fx.testing.survey.prompts import image_prompt

from ..runtime.helpers import Pair, own_compiler_state

ROUNDING = 2e-6


@pytest.fixture(scope="module")
def family() -> Any:
    return build_family("lfm2_vl")


@pytest.fixture(scope="module")
def compiled(family: Any) -> Iterator[Pair]:
    with own_compiler_state():
        model = vlcache_fx.compile(
            copy.deepcopy(family.model),
            lowering="eager",
            dynamic=True,
            budget=0.2,
            min_span_tokens=2,
            strict=True,
        )
        yield Pair(model, family.model, model.vlcache)


@pytest.fixture
def pair(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(family: Any, before: int = 5, after: int = 9, text: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = image_prompt(family, before, after, image=1, text=text)
    return found


def hiding(inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return the prompt with the first tokens hidden, as padding on the left is."""
    mask: Tensor = inputs["attention_mask"].clone()
    mask[:, :tokens] = 0
    return inputs | {"attention_mask": mask}


def test_calls_with_a_mask_are_reused(pair: Pair, family: Any) -> None:
    assert pair.run(**prompt(family))[1]["mode"] == "cold"
    off, report = pair.run(**prompt(family))
    assert (report["mode"], report["prefix_tokens"]) == ("warm", len(prompt(family)["input_ids"][0]) - 9)
    assert off <= ROUNDING
    with pair.engine.using(policy="full"):
        off, report = pair.run(**prompt(family, before=8, text=1))
    assert report["mode"] == "warm"
    assert off <= ROUNDING


@pytest.mark.parametrize("order", [(0, 2), (2, 0)])
def test_prompts_of_other_masks_share_no_prefix(pair: Pair, family: Any, order: tuple[int, int]) -> None:
    """States behind hidden tokens are not those behind the same tokens, shown."""
    for tokens in order:
        off, report = pair.run(**hiding(prompt(family), tokens))
        assert report["prefix_tokens"] == 0
        if report["mode"] == "cold":
            assert off <= ROUNDING
    with pair.engine.using(policy="full"):
        off, _ = pair.run(**hiding(prompt(family), order[1]))
    assert off <= ROUNDING
