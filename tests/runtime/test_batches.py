"""Several prompts in one call: each is served as in a call of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.testing.families import llava_inputs, tiny_llava
from vlcache_fx.testing.prompts import PAD
from vlcache_fx.testing.tiny_vlm import tiny_vlm_inputs

from ..models import batch_of, padded
from .helpers import Pair, hits, with_api, with_backend

LAYERS = 2
TOLERANCE = 1e-5


def prompt(before: int, after: int, *images: int, text: int = 0) -> dict[str, Tensor]:
    """Images of 16 to 20 tokens, by seed."""
    return tiny_vlm_inputs(before, after, [(16 + seed, seed) for seed in images], text_seed=text)


@pytest.fixture(scope="module", params=[False, True], ids=["places", "counted"])
def pair(request: Any, _compiler: None) -> Pair:
    """A model whose positions count padding, and one whose positions do not; all logits."""
    return with_backend(padded(num_layers=LAYERS, last_only=False, counted=request.param), budget=0.1)


@pytest.fixture
def fresh(pair: Pair) -> Pair:
    pair.engine.clear()
    return pair


def on_real_tokens(pair: Pair, call: dict[str, Tensor]) -> tuple[float, dict[str, Any]]:
    """Return the largest error of logits outside padding, and the report."""
    got, want = pair.both(**call)
    assert got.shape == want.shape
    return float((got - want)[call["kept"]].abs().max()), pair.report


@pytest.mark.parametrize("left", [True, False])
def test_cold_equals_unmodified(fresh: Pair, left: bool) -> None:
    call = batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1), left=left)
    got, want = fresh.both(**call)
    assert fresh.report["mode"] == "cold"
    assert torch.equal(got, want)
    assert [(s["sample"], s["length"], s["hit"]) for s in fresh.report["spans"]] == [
        (0, 16, False),
        (1, 17, False),
    ]


@pytest.mark.parametrize("left", [True, False])
def test_full_recompute_equals_unmodified(fresh: Pair, left: bool) -> None:
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    call = batch_of(prompt(2, 4, 1, 0, text=2), prompt(11, 9, 0, text=3), left=left)
    with fresh.engine.using(policy="full"):
        got, want = fresh.both(**call)
    assert fresh.report["mode"] == "warm"
    assert [(s["sample"], s["hit"]) for s in fresh.report["spans"]] == [(0, True), (0, True), (1, True)]
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_computed(fresh: Pair, left: bool) -> None:
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    call = batch_of(prompt(4, 8, 0, text=2), prompt(3, 7, 1, text=3), left=left, tokens=60)
    with fresh.engine.using(policy="none", budget=0.0):
        _, report = on_real_tokens(fresh, call)
    assert report["mode"] == "warm"
    assert report["num_tokens"] == 60
    assert report["rows_per_layer"] == (12,) * (LAYERS + 1)  # rows of the sample with more text


@pytest.mark.parametrize("left", [True, False])
def test_repeated_prompts_are_exact(fresh: Pair, left: bool) -> None:
    """In the context of its donor, no row needs recomputing."""
    call = batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1), left=left)
    on_real_tokens(fresh, call)
    for policy in ("none", "uniform"):
        with fresh.engine.using(policy=policy):
            off, report = on_real_tokens(fresh, call)
        assert report["mode"] == "warm"
        assert off < TOLERANCE
        assert report["rows_per_layer"][0] < 20


@pytest.mark.works("Inputs", "hit and miss in one batch", "the hit is reused")
def test_hit_and_miss_in_one_batch(fresh: Pair) -> None:
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    call = batch_of(prompt(7, 5, 0, text=2), prompt(4, 6, 3, text=3))
    with fresh.engine.using(policy="none"):
        got, want = fresh.both(**call)
    assert fresh.report["mode"] == "warm"
    assert hits(fresh.report) == [True, False]
    torch.testing.assert_close(got[1][call["kept"][1]], want[1][call["kept"][1]], atol=TOLERANCE, rtol=0)
    assert float((got[0] - want[0]).abs().max()) > 1e-3  # reused after another text
    # The image that missed was computed exactly and is stored now.
    with fresh.engine.using(policy="none"):
        on_real_tokens(fresh, call)
    assert hits(fresh.report) == [True, True]


def test_sample_without_images_is_computed_in_full(fresh: Pair) -> None:
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    call = batch_of(prompt(7, 5, 0, text=2), prompt(30, 0, text=3))
    with fresh.engine.using(policy="none"):
        got, want = fresh.both(**call)
    assert [span["sample"] for span in fresh.report["spans"]] == [0]
    assert fresh.report["rows_per_layer"] == (30,) * (LAYERS + 1)
    torch.testing.assert_close(got[1][call["kept"][1]], want[1][call["kept"][1]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("policy", ["full", "uniform", "none"])
@pytest.mark.parametrize("left", [True, False])
def test_results_do_not_depend_on_other_samples(fresh: Pair, policy: str, left: bool) -> None:
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1), prompt(3, 3, 2, text=4)))
    own = prompt(7, 5, 0, text=2)
    others = (
        prompt(2, 2, 1, text=5),  # short, so that it is padded
        prompt(4, 6, 2, 1, 0, text=3),
        prompt(8, 1, 4, text=6),  # a miss
        prompt(40, 0, text=7),
    )
    answers = []
    with fresh.engine.using(policy=policy):
        for place, other in enumerate(others):
            pair_of = (own, other) if place % 2 else (other, own)
            # Equal lengths: another length would change positions that count padding.
            call = batch_of(*pair_of, left=left, tokens=80)
            with torch.no_grad():
                got = fresh.model(**call)
            assert fresh.report["mode"] == "warm"
            sample = 0 if place % 2 else 1
            answers.append(got[sample][call["kept"][sample]])
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("left", [True, False])
def test_last_token_is_always_computed(fresh: Pair, left: bool) -> None:
    """No other token attends to it, but it is not padding."""
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    call = batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1), left=left)
    with fresh.engine.using(policy="none"):
        got, want = fresh.both(**call)
    assert fresh.report["mode"] == "warm"
    for sample, kept in enumerate(call["kept"]):
        last = int(kept.nonzero()[-1])
        same = torch.dist(got[sample, last], want[sample, last])
        off_by_text = torch.dist(got[sample, last], want[1 - sample, last])
        assert same < off_by_text / 3


def test_donors_serve_single_and_batched_calls(fresh: Pair) -> None:
    """A single prompt finds the donors of a batch, and vice versa."""
    on_real_tokens(fresh, batch_of(prompt(5, 6, 0), prompt(9, 3, 1, text=1)))
    _, alone = on_real_tokens(fresh, batch_of(prompt(7, 5, 1, text=2)))
    assert (alone["mode"], hits(alone)) == ("warm", [True])
    _, new = on_real_tokens(fresh, batch_of(prompt(7, 5, 4, text=2)))
    assert new["mode"] == "cold"
    with fresh.engine.using(policy="full"):
        off, report = on_real_tokens(fresh, batch_of(prompt(5, 6, 4), prompt(9, 3, 0, text=1)))
    assert hits(report) == [True, True]
    assert off < TOLERANCE


def test_hidden_image_stores_no_donor_for_visible_image(fresh: Pair) -> None:
    hidden, usual = batch_of(prompt(5, 6, 0)), batch_of(prompt(5, 6, 0))
    hidden["kept"][:, 5:21] = False
    assert on_real_tokens(fresh, hidden)[1]["mode"] == "cold"
    with fresh.engine.using(policy="none"):
        off, report = on_real_tokens(fresh, usual)
    assert (report["mode"], off) == ("cold", 0.0)
    # A miss in a warm batch does not store rows that were not computed.
    both = batch_of(prompt(5, 6, 0), prompt(9, 3, 3, text=1))
    both["kept"][1, 9:28] = False
    with fresh.engine.using(policy="none"):
        on_real_tokens(fresh, both)
        assert hits(fresh.report) == [True, False]
        off, report = on_real_tokens(fresh, both)
    assert hits(report) == [True, True]
    assert off < TOLERANCE


def test_last_logits_only() -> None:
    pair = with_backend(padded(num_layers=LAYERS, counted=True), policy="none")
    on = [prompt(5, 6, 0), prompt(9, 3, 1, text=1)]
    assert pair.run(**batch_of(*on))[0] < TOLERANCE
    off, report = pair.run(**batch_of(*on))
    assert report["mode"] == "warm"
    assert report["rows_per_layer"] == (12, 12, 2)  # the row of the results, and one more
    assert off < TOLERANCE


# A model of the library -------------------------------------------------------------------------------------


def llava_batch(*prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    """With padding on the left, as in generation."""
    longest = max(one["input_ids"].shape[1] for one in prompts)

    def joined(name: str, value: int) -> Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(one[name], (longest - one[name].shape[1], 0), value=value)
                for one in prompts
            ]
        )

    pixels = torch.cat([one["pixel_values"] for one in prompts if "pixel_values" in one])
    return {
        "input_ids": joined("input_ids", PAD),
        "attention_mask": joined("attention_mask", 0),
        "pixel_values": pixels,
    }


@pytest.mark.works("Inputs", "padded batches by `generate()`")
def test_llava_generate_equals_unmodified() -> None:
    pair = with_api(tiny_llava(1), policy="full")
    calls = [
        llava_batch(llava_inputs(5, 7, [0]), llava_inputs(9, 3, [1], 1)),
        llava_batch(llava_inputs(7, 5, [1, 0], 2), llava_inputs(4, 6, [0], 3)),
        llava_batch(llava_inputs(7, 5, [1], 2), llava_inputs(4, 6, [2], 3)),
    ]
    found = [[False, False], [True, True, True], [True, False]]
    for call, expected in zip(calls, found, strict=True):
        off, report = pair.run(**call)
        assert hits(report) == expected
        assert off < TOLERANCE
    ours, theirs = (
        model.generate(**calls[1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for model in (pair.model, pair.reference)
    )
    assert torch.equal(ours, theirs)
