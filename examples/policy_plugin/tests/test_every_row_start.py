"""Tests of a package with a policy: its choice, the contract, and a model that runs with it."""

from dataclasses import replace

import pytest
import torch
from every_row_start import EveryRowStart
from typer.testing import CliRunner

from vlcache_fx.backend import engine_for
from vlcache_fx.cli import app
from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import SpanContext, get_policy
from vlcache_fx.testing.policy_contract import check_policy
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs


@pytest.mark.parametrize("width", [1, 7, 16])
def test_the_contract_is_kept(width: int) -> None:
    assert check_policy(EveryRowStart(width)) == []


def test_what_is_chosen() -> None:
    span = SpanContext(length=50, num_layers=2, budget=0.2)
    first, last = EveryRowStart(width=10).select(span)
    assert first.tolist() == [0, 1, 2, 3, 4, 10, 20, 30, 40]
    assert last is first
    first, _ = EveryRowStart(width=10).select(replace(span, grid=(1, 2, 25)))
    assert first.tolist() == [0, 1, 2, 3, 4, 25]


def test_a_picture_row_has_tokens() -> None:
    with pytest.raises(PolicyError, match="width must be an integer >= 1, not 0"):
        EveryRowStart(0)


def test_it_is_found_by_name() -> None:
    assert get_policy("every_row_start") == EveryRowStart()
    listed = CliRunner().invoke(app, ["policies"], env={"COLUMNS": "200"})
    assert "The first tokens for half of the budget" in listed.output


def test_a_model_runs_with_it() -> None:
    options = {"policy": "every_row_start", "budget": 0.1, "lowering": "eager"}
    model = torch.compile(tiny_vlm(), backend="vlcache", options=options, dynamic=True)
    with torch.no_grad():
        for text in range(2):
            model(**tiny_vlm_inputs(before=5 + text, after=6, images=[(40, 0)], text_seed=text))
    report = engine_for(options).last_report
    assert report["mode"] == "warm"
    assert report["rows_per_layer"][0] == 12 + 4  # the text around the picture, and a tenth of the picture
    assert report["explanations"] == ()
