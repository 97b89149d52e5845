"""Exact reuse of prefixes: the prefix that a prompt finds, and the blocks that it stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.keys.entry_key import KeyScope
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.blocks import BLOCK_TOKENS, Block, BlockSplitter
from vlcache_fx.runtime.requests.media_spans import MediaSpan
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..helpers import Pair, cache_distance, hits, keys, with_api, with_backend

A, B, C = (24, 0), (30, 1), (27, 2)
LAYERS = 2
TOLERANCE = 1e-5
SCOPE = KeyScope("", "weights")


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    """The policy recomputes no rows, so approximate reuse shows."""
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="none")


@pytest.fixture
def vlm(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def chat(*images: tuple[int, int], before: int = 20, after: int = 40) -> dict[str, Tensor]:
    """Return a prompt whose texts are prefixes of the same long texts."""
    return tiny_vlm_inputs(before, after, images)


def rewritten(inputs: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """The same prompt with another word at ``token``."""
    ids = inputs["input_ids"].clone()
    ids[0, token] = (ids[0, token] + 1) % 100
    return inputs | {"input_ids": ids}


# Prefixes ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    before=st.integers(1, 40), after=st.integers(2, 60), place=st.integers(0, 59),
    images=st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=2, unique=True),
)  # fmt: skip
def test_exact_prefix_of_changed_prompt(
    compiled: Pair, before: int, after: int, place: int, images: list[tuple[int, int]]
) -> None:
    compiled.engine.clear()
    inputs = chat(*images, before=before, after=after)
    compiled.run(**inputs)
    changed = inputs["input_ids"].shape[1] - after + place % after
    off, report = compiled.run(**rewritten(inputs, changed))
    end_of_media = max(span["start"] + span["length"] for span in report["spans"])
    assert report["mode"] == "warm"
    assert report["prefix_tokens"] == end_of_media + (changed - end_of_media) // BLOCK_TOKENS * BLOCK_TOKENS
    left = report["num_tokens"] - report["prefix_tokens"]
    assert report["rows_per_layer"][:LAYERS] == (max(left, 2),) * LAYERS
    assert off <= TOLERANCE


def test_other_prefix_reuses_approximately(vlm: Pair) -> None:
    inputs = chat(A)
    vlm.run(**inputs)
    off, report = vlm.run(**rewritten(inputs, 3))
    assert (report["mode"], report["prefix_tokens"], hits(report)) == ("warm", 0, [True])
    assert off > TOLERANCE


def test_approximate_rows_are_not_stored_as_exact(vlm: Pair) -> None:
    inputs = chat(A)
    vlm.run(**inputs)
    moved = rewritten(inputs, 3)
    held = len(vlm.engine.store)
    for _ in range(3):
        _, report = vlm.run(**moved)
        assert report["prefix_tokens"] == 0
    assert len(vlm.engine.store) == held


def test_exact_prefix_before_approximate_image(vlm: Pair) -> None:
    vlm.run(**chat(A, B))
    inputs = chat(A, B)
    between = int(vlm.report["spans"][1]["start"]) - 1
    off, report = vlm.run(**rewritten(inputs, between))
    first, second = report["spans"]
    assert hits(report) == [True, True]
    assert first["start"] + first["length"] <= report["prefix_tokens"] < second["start"]
    assert off > TOLERANCE
    text = report["num_tokens"] - second["length"] - report["prefix_tokens"]
    assert report["rows_per_layer"][:LAYERS] == (text,) * LAYERS


def test_policy_recomputes_exact_prefix(vlm: Pair) -> None:
    inputs = chat(A)
    vlm.run(**inputs)
    with vlm.engine.using(policy="full"):
        off, report = vlm.run(**inputs)
    assert report["prefix_tokens"] == 0
    assert report["rows_per_layer"][:LAYERS] == (report["num_tokens"],) * LAYERS
    assert off == 0.0


@pytest.mark.parametrize(("before", "mode"), [(20, "cold"), (60, "warm")])
def test_prefix_of_text_before_new_image_needs_most_of_prompt(vlm: Pair, before: int, mode: str) -> None:
    vlm.run(**chat(A, before=before, after=4))
    off, report = vlm.run(**chat(C, before=before, after=4))
    assert (report["mode"], hits(report)) == (mode, [False])
    assert off <= TOLERANCE


def test_other_weights_find_no_prefix(vlm: Pair) -> None:
    inputs = chat(A)
    vlm.run(**inputs)
    weight = vlm.model.decoder.layers[0].attention.value.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    got, _ = vlm.both(**inputs)
    report = vlm.report
    with torch.no_grad():
        weight.copy_(kept)
    assert report["mode"] == "cold"
    assert got.isfinite().all()


# Later turns -----------------------------------------------------------------------------------------------


def test_conversation_that_resends_all_turns(vlm: Pair) -> None:
    turns = [chat(A, after=30), chat(A, after=70), chat(A, after=110)]
    known = 0
    for number, turn in enumerate(turns):
        off, report = vlm.run(**turn)
        assert off <= TOLERANCE
        assert report["mode"] == ("warm" if number else "cold")
        if number:  # all but the last block of the turn before
            assert known - BLOCK_TOKENS < report["prefix_tokens"] <= known
        known = report["num_tokens"]


def test_new_image_after_exact_prefix_is_recorded(vlm: Pair) -> None:
    vlm.run(**chat(A))
    off, report = vlm.run(**chat(A, C))
    assert hits(report) == [True, False]
    assert off <= TOLERANCE
    assert keys(report)[1] in vlm.engine.store
    held = vlm.engine.store.get(keys(report)[1])
    vlm.engine.clear()
    vlm.run(**chat(A, C))
    computed = vlm.engine.store.get(keys(vlm.report)[1])
    assert held is not None
    assert computed is not None
    for slot, rows in computed.tensors.items():
        torch.testing.assert_close(held.tensors[slot], rows, atol=TOLERANCE, rtol=0)


def test_generate_continues_from_complete_cache() -> None:
    pair = with_api(tiny_qwen2_5_vl(LAYERS), policy="none")
    inputs = qwen_inputs(20, 20, [(8, 8, 0)])
    arguments: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False,
                                 "return_dict_in_generate": True}  # fmt: skip
    pair.model.generate(**inputs, **arguments)
    ours = pair.model.generate(**inputs, **arguments)
    theirs = pair.reference.generate(**inputs, **arguments)
    assert pair.report["prefix_tokens"] == inputs["input_ids"].shape[1]
    assert torch.equal(ours.sequences, theirs.sequences)
    assert cache_distance(ours.past_key_values, theirs.past_key_values) <= TOLERANCE


# Blocks -----------------------------------------------------------------------------------------------------


def blocks(ids: Tensor, media_spans: list[tuple[int, int]], shortest: int = 1, **others: Any) -> list[Block]:
    found = [
        MediaSpan(0, start, length, (torch.full((length, 2), float(start)),)) for start, length in media_spans
    ]
    spans = [
        Span(0, one.start, one.length, f"span {one.start}", False) for one in found if one.length >= shortest
    ]
    by_token = [ids[0], *others.get("more", ())]
    root, seen = others.get("root", ""), others.get("seen")
    return list(BlockSplitter().blocks([ids], by_token, found, spans, ids.shape[-1], root, SCOPE, seen))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=3),
    after=st.integers(0, 40), changed=st.integers(0, 10**6),
)  # fmt: skip
def test_blocks_cover_prompt_and_key_prefix(lengths: list[tuple[int, int]], after: int, changed: int) -> None:
    media_spans, at = [], 0
    for text, media in lengths:
        media_spans.append((at + text, media))
        at += text + media
    ids = torch.arange(at + after)[None]
    found = blocks(ids, media_spans, shortest=8)
    assert [0, *(block.end for block in found)] == [*(block.start for block in found), ids.shape[1]]
    assert [(p.start, p.length) for p in found if p.span] == [
        bounds for bounds in media_spans if bounds[1] >= 8
    ]
    place = changed % ids.shape[1]
    other = ids.clone()
    other[0, place] = -1
    for one, two in zip(found, blocks(other, media_spans, shortest=8), strict=True):
        assert (one.before == two.before) == (one.start <= place)
        assert (one.key == two.key) == (one.end <= place or one.span is not None)


@pytest.mark.parametrize(
    "change",
    [
        {"root": "other weights"},
        {"more": (torch.zeros(20, 3),)},
        {"more": (torch.zeros(20, 20),)},  # as wide as the prompt is long
        {"seen": [b"a window"] * 20},
    ],
    ids=["root", "value", "square value", "mask"],
)
def test_block_keys_cover(change: dict[str, Any]) -> None:
    ids = torch.arange(20)[None]
    plain, other = blocks(ids, [(4, 4)]), blocks(ids, [(4, 4)], **change)
    assert all(one.key != two.key for one, two in zip(plain, other, strict=True) if one.span is None)


@pytest.mark.parametrize("place", [0, 5, 13, 19])
def test_block_keys_after_row_with_other_mask(place: int) -> None:
    ids, seen = torch.arange(20)[None], [b"all"] * 20
    other = [*seen[:place], b"window", *seen[place + 1 :]]
    one, two = (blocks(ids, [(4, 4)], seen=rows) for rows in (seen, other))
    for before, after in zip(one, two, strict=True):
        assert (before.key == after.key) == (before.end <= place or before.span is not None)
        assert (before.before == after.before) == (before.start <= place)


def test_block_keys_ignore_prompt_length() -> None:
    short, long = (blocks(torch.arange(length)[None], [(4, 4)], seen=[b""] * length) for length in (40, 90))
    assert [block.key for block in short[:-1]] == [block.key for block in long[: len(short) - 1]]


def test_block_keys_cover_content_of_short_media() -> None:
    ids = torch.arange(20)[None]
    made = [
        list(
            BlockSplitter().blocks(
                [ids], [ids[0]], [MediaSpan(0, 4, 4, (torch.full((4, 2), value),))], [], 20, "", SCOPE
            )
        )
        for value in (0.0, 1.0)
    ]
    assert [one.key == two.key for one, two in zip(*made, strict=True)] == [True, False, False]


@pytest.mark.parametrize("place", [0, 3, 8, 12, 19])
def test_block_keys_cover_embeddings_outside_spans(place: int) -> None:
    embeds = torch.arange(80.0).view(1, 20, 4)
    other = embeds.clone()
    other[0, place] = -1
    reader = BlockSplitter(embeddings=0)
    media_span = MediaSpan(0, 4, 6, (embeds[0, 4:10],))
    one, two = (
        list(reader.blocks([value], [], [media_span], [Span(0, 4, 6, "span", False)], 20, "", SCOPE))
        for value in (embeds, other)
    )
    in_span = 4 <= place < 10
    for before, after in zip(one, two, strict=True):
        assert (before.key == after.key) == (before.end <= place or before.span is not None or in_span)
