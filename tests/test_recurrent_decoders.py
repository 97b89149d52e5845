"""Reuse through recurrent layers: delta rules, state spaces and short convolutions, between attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm_inputs

from .runtime.helpers import Pair, hits, own_compiler_state, with_api, with_backend

KINDS = ["dda", "sas", "cac", "pd", "cdsap"]
"""Layers, a letter each: see ``tiny_hybrid``."""

A, B, C = (40, 0), (31, 1), (24, 2)
ROUNDING = 2e-6


def prompt(*images: tuple[int, int], before: int = 5, after: int = 9, text: int = 0) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, after, images, text_seed=text)


def clear_text(pair: Pair) -> None:
    """Drop the entries of text: no prompt has an exact prefix then."""
    store = pair.engine.store
    for info in list(store.entries()):
        if info.key.startswith("text"):
            store.clear(Selection(key=info.key))


@pytest.fixture(scope="module", params=KINDS)
def compiled(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with own_compiler_state():
        yield with_backend(
            tiny_hybrid(request.param, last_only=False), policy="uniform", budget=0.1, strict=True
        )


@pytest.fixture
def pair(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def test_cold_equals_unmodified(pair: Pair) -> None:
    off, report = pair.run(**prompt(A, B))
    assert report["mode"] == "cold"
    assert off <= ROUNDING


def test_full_recompute_equals_unmodified(pair: Pair) -> None:
    pair.run(**prompt(A, B))
    with pair.engine.using(policy="full"):
        off, report = pair.run(**prompt(B, A, before=11, text=1))
    assert (report["mode"], hits(report)) == ("warm", [True, True])
    assert off <= ROUNDING


@pytest.mark.parametrize("policy", ["none", "uniform", "layer_aware"])
def test_donor_in_its_own_context_is_exact(pair: Pair, policy: str) -> None:
    """The maps of an item, applied behind the same text, give the states of the unmodified model."""
    pair.run(**prompt(A))
    clear_text(pair)
    with pair.engine.using(policy=policy):
        off, report = pair.run(**prompt(A, after=14))
    assert (report["mode"], report["prefix_tokens"], hits(report)) == ("warm", 0, [True])
    assert off <= ROUNDING


def test_several_items_in_their_own_context(pair: Pair) -> None:
    """Jumps over both items, with text between them."""
    pair.run(**prompt(A, B))
    clear_text(pair)
    off, report = pair.run(**prompt(A, B, after=12))
    assert (report["mode"], report["prefix_tokens"], hits(report)) == ("warm", 0, [True, True])
    assert off <= ROUNDING


def test_item_that_misses_between_hits(pair: Pair) -> None:
    pair.run(**prompt(A, B))
    with pair.engine.using(policy="full"):
        off, report = pair.run(**prompt(A, C, B, before=8, text=3))
    assert (report["mode"], hits(report)) == ("warm", [True, False, True])
    assert off <= ROUNDING


def test_moved_item_is_close(pair: Pair) -> None:
    """Behind another text a donor is approximate: better than without the item, and than another item."""
    pair.run(**prompt(A))
    pair.run(**prompt(B))
    off, report = pair.run(**prompt(A, before=12, text=1))
    assert report["mode"] == "warm"
    assert report["token_layer_fraction"] == pytest.approx(0.1)
    with torch.no_grad():
        want = pair.reference(**prompt(A, before=12, text=1))
        other = pair.reference(**prompt((40, 7), before=12, text=1))
    assert 0 < off < float((want - other).abs().max())


def test_rows_are_the_first_of_each_item(pair: Pair) -> None:
    pair.run(**prompt(A))
    _, report = pair.run(**prompt(A, before=12, text=1))
    layers = len(report["rows_per_layer"])
    assert report["rows_per_layer"] == (12 + 9 + 4,) * layers


@pytest.mark.parametrize("after", [9, 30])
def test_exact_prefix(pair: Pair, after: int) -> None:
    """A prompt that branches behind the item continues from the item's states."""
    pair.run(**prompt(A))
    off, report = pair.run(**prompt(A, after=after, text=0))
    assert (report["mode"], report["prefix_tokens"]) == ("warm", 45)
    assert off <= ROUNDING


def test_conversation_continues_from_the_last_block(pair: Pair) -> None:
    """Text counts in blocks of 16 tokens: the next turn computes the rest of the last one, and the new text.

    The warm program records states for the turn after.
    """
    first = prompt(A, after=37)
    longer = {name: torch.cat([value, value[:, -20:]], 1) if name == "input_ids" else value
              for name, value in first.items()}  # fmt: skip
    pair.run(**first)
    off, report = pair.run(**longer)
    assert (report["mode"], report["prefix_tokens"]) == ("warm", 45 + 32)
    assert off <= ROUNDING
    off, report = pair.run(**longer)  # recorded by the warm program
    assert report["prefix_tokens"] == 45 + 48
    assert off <= ROUNDING


def test_new_item_behind_an_exact_prefix_is_recorded(pair: Pair) -> None:
    pair.run(**prompt(A))
    off, report = pair.run(**prompt(A, B))
    assert (report["mode"], hits(report), report["prefix_tokens"]) == ("warm", [True, False], 45)
    assert off <= ROUNDING
    with pair.engine.using(policy="full"):
        off, report = pair.run(**prompt(B, before=3, text=4))
    assert (report["mode"], hits(report)) == ("warm", [True])
    assert off <= ROUNDING


def test_other_budgets_use_the_cuts_of_the_donor(pair: Pair) -> None:
    """A donor has maps from its start, from the rows of the budget when it was made, and from its end."""
    pair.run(**prompt(A))
    shares = []
    for budget in (0.0, 0.05, 0.1, 0.5, 1.0):
        clear_text(pair)
        with pair.engine.using(budget=budget):
            off, report = pair.run(**prompt(A, after=11))
        shares.append(report["token_layer_fraction"])
        assert off <= ROUNDING
    assert shares == pytest.approx([0.0, 0.0, 0.1, 0.1, 1.0])


def test_scattered_rows_are_refused(pair: Pair) -> None:
    pair.run(**prompt(A))
    pair.engine.set_options(pair.engine.options)  # as compiled: strict
    with pair.engine.using(policy="random"), pytest.raises(Exception, match="first rows only"):
        pair.run(**prompt(A, before=9, text=2))


def test_scattered_rows_become_first_rows() -> None:
    with own_compiler_state():
        pair = with_backend(tiny_hybrid("da", last_only=False), policy="random", budget=0.1)
        pair.run(**prompt(A))
        _, report = pair.run(**prompt(A, before=9, text=2))
        assert report["mode"] == "warm"
        assert "recurrent layers can recompute the first rows only" in str(report["explanations"])
        with pair.engine.using(policy="cacheblend"):
            off, report = pair.run(**prompt(A, before=10, text=5))
        assert (report["mode"], report["reason_code"]) == ("bypass", Reason.NO_PLAN)
        assert off == 0.0


def test_tenants_and_weights_share_nothing() -> None:
    with own_compiler_state():
        pair = with_backend(tiny_hybrid("da"), policy="none")
        pair.run(**prompt(A))
        with pair.engine.using(salt="other"):
            assert pair.run(**prompt(A))[1]["mode"] == "cold"
        with torch.no_grad():
            for model in (pair.model, pair.reference):
                model.decoder.layers[0].mixer.convolution.weight.mul_(1.5)
        off, report = pair.run(**prompt(A, after=12))
        assert report["mode"] == "cold"
        assert off <= ROUNDING


def test_float64() -> None:
    with own_compiler_state():
        pair = with_backend(tiny_hybrid("sda", last_only=False).to(torch.float64), policy="none", strict=True)
        pair.run(**cast(prompt(A), torch.float64))
        clear_text(pair)
        off, report = pair.run(**cast(prompt(A, after=12), torch.float64))
        assert report["mode"] == "warm"
        assert off <= 1e-7  # rotary angles are in float32


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def test_donors_of_a_folder(tmp_path: Any) -> None:
    """States of recurrent layers outlive the process."""
    with own_compiler_state():
        pair = with_api(tiny_hybrid("cda", last_only=False), policy="none", store=f"file://{tmp_path}/s")
        pair.run(**prompt(A))
        pair.engine.store.flush(30)
        clear_text(pair)
        again = with_api(tiny_hybrid("cda", last_only=False), policy="none", store=f"file://{tmp_path}/s")
        off, report = again.run(**prompt(A, after=12))
        assert (report["mode"], report["spans"][0]["donor_tier"]) == ("warm", "file")
        assert off <= ROUNDING
        pair.engine.close()
        again.engine.close()


@pytest.mark.parametrize("kinds", ["dp", pytest.param("cdsp", marks=pytest.mark.thorough)])
def test_inductor(kinds: str) -> None:
    with own_compiler_state():
        pair = with_backend(
            tiny_hybrid(kinds, last_only=False),
            policy="uniform",
            budget=0.1,
            strict=True,
            lowering="inductor",
        )
        assert pair.run(**prompt(A))[0] <= ROUNDING
        clear_text(pair)
        off, report = pair.run(**prompt(A, after=12))
        assert report["mode"] == "warm"
        assert off <= ROUNDING
