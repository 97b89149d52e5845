"""Masks of a call: causal or not, padding, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.analysis import analyze
from vlcache_fx.compiler.builders.masks import find_masks
from vlcache_fx.errors import Reason
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests import masks as mask_check
from vlcache_fx.runtime.requests.bidirectional import Range
from vlcache_fx.runtime.requests.masks import MaskChecker, MaskSummary
from vlcache_fx.runtime.requests.prologue import Prologue
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import repeat_heads
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()
SPANS = [Span(0, 2, 3, "image", False)]


def with_more(*places: tuple[slice | int, slice | int]) -> Tensor:
    mask = CAUSAL.clone()
    for rows, columns in places:
        mask[rows, columns] = True
    return mask


# Masks of a graph -------------------------------------------------------------------------------------------

TOKENS, IMAGE = 8, slice(2, 5)
PROMPTS = [tiny_vlm_inputs(2, 3, [(3, seed)], text_seed=seed) for seed in range(2)]
CALL = {name: torch.cat([prompt[name] for prompt in PROMPTS]) for name in PROMPTS[0]}
BOTH = [[Span(sample, 2, 3, "image", False)] for sample in range(2)]


class Given(TinyVlm):
    """Each layer has its own mask, or none; keys of earlier calls may precede."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        past = more.get("past", torch.zeros(len(x), 1, 0, 8))
        for index, layer in enumerate(self.decoder.layers):
            query, *own = layer.attention.project(layer.norm_1(x))
            key, value = (repeat_heads(torch.cat([past, part], 2), 2) for part in own)
            mask = more.get(f"mask_{index}")
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
            x = x + layer.attention.out(y.transpose(1, 2).reshape(x.shape))
            x = x + layer.mlp(layer.norm_2(x))
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits


class CheckedGraph:
    """The mask checker of a graph, and the graph's inputs by name."""

    def __init__(self, call: dict[str, Tensor] = CALL, **more: Tensor) -> None:
        model = tiny_vlm(cls=Given, last_only=False)
        captured, graph = captured_graph(model, call | more)
        index = {node: number for number, node in enumerate(captured.placeholders)}
        found = find_masks(analyze(captured), index)
        masks, cache_values = (
            extract(captured.graph_module, nodes) for nodes in (found.masks, found.cache_values)
        )
        self.check = MaskChecker(found.spec, Prologue(masks=masks, cache_values=cache_values))
        self.args = list(graph.calls[0])
        self.place = {
            name: next(index for index, arg in enumerate(self.args) if arg is value)
            for name, value in (call | more).items()
        }

    def __call__(self, spans: Sequence[Sequence[Span]] = BOTH, **changes: Tensor) -> MaskSummary:
        for name, value in changes.items():
            self.args[self.place[name]] = value
        return self.check.check(self.args, self.args, TOKENS, spans)


def for_both(*masks: Tensor, additive: bool = False) -> Tensor:
    """[2, 1, 8, 8], or [1, 1, 8, 8] of one mask."""
    mask = torch.stack(masks)[:, None]
    return torch.where(mask, 0.25, torch.finfo(torch.float32).min) if additive else mask


def hiding(*places: int) -> Tensor:
    mask = CAUSAL.clone()
    mask[:, list(places)] = False
    return mask


def padding(summary: MaskSummary) -> list[list[int] | None]:
    return [None if places is None else places.tolist() for places in summary.padding]


@pytest.fixture(scope="module")
def alone(_compiler: None) -> CheckedGraph:
    """A graph of one prompt; each layer reads its own mask."""
    masks = {f"mask_{index}": CAUSAL[None, None].clone() for index in range(2)}
    return CheckedGraph(PROMPTS[0], **masks)


@pytest.fixture(scope="module", params=[False, True], ids=["bool", "additive"])
def checked(request: Any, _compiler: None) -> tuple[CheckedGraph, bool]:
    """Both layers read one mask."""
    mask = for_both(CAUSAL, CAUSAL, additive=request.param)
    return CheckedGraph(mask_0=mask, mask_1=mask), request.param


@pytest.mark.parametrize(
    ("first", "second", "hidden"),
    [
        (CAUSAL, CAUSAL, [[], []]),  # each token attends to itself, the last one too
        (hiding(0, 1), CAUSAL, [[0, 1], []]),
        (CAUSAL, hiding(6, 7), [[], [6, 7]]),
        (hiding(0), hiding(0, 7), [[0], [0, 7]]),
        (CAUSAL & CAUSAL.triu(-2), hiding(3), [[], [3]]),
    ],
    ids=["whole", "left", "right", "both sides", "a window, and inside"],
)
def test_padding(
    checked: tuple[CheckedGraph, bool], first: Tensor, second: Tensor, hidden: list[list[int]]
) -> None:
    check, additive = checked
    mask = for_both(first, second, additive=additive)
    summary = check(mask_0=mask, mask_1=mask)
    assert padding(summary) == hidden
    assert (summary.refusal, summary.is_causal, summary.ignores_past) == (None, True, True)


def test_refuses_image_that_attends_to_question(checked: tuple[CheckedGraph, bool]) -> None:
    check, additive = checked
    mask = for_both(CAUSAL, with_more((4, 5)), additive=additive)
    summary = check(mask_0=mask, mask_1=mask)
    assert summary.refusal is not None
    assert summary.refusal.reason is Reason.MASK_FORM
    assert "span at 2 attend to tokens after the span" in str(summary.refusal)
    assert not summary.is_causal
    # The other sample has no span, and text may attend to later tokens.
    assert check([BOTH[0], []], mask_0=mask, mask_1=mask).refusal is None


def test_accepts_image_both_ways(checked: tuple[CheckedGraph, bool]) -> None:
    check, additive = checked
    mask = for_both(CAUSAL, with_more((IMAGE, IMAGE)), additive=additive)
    summary = check(mask_0=mask, mask_1=mask)
    assert (summary.refusal, summary.is_causal) == (None, True)
    summary = check([BOTH[0], []], mask_0=mask, mask_1=mask)  # no span there
    assert (summary.refusal, summary.is_causal) == (None, False)


@pytest.mark.parametrize(
    ("mask", "is_causal", "ranges"),
    [
        (CAUSAL, True, []),
        (CAUSAL & CAUSAL.triu(-3), True, []),
        (with_more((IMAGE, IMAGE)), True, []),
        (with_more((4, 5)), True, [Range(2, 6)]),
        (with_more((0, 1)), False, []),  # text
        (with_more((slice(0, 6), slice(0, 6))), True, [Range(0, 6)]),
        (with_more((slice(0, 8), slice(0, 8))), True, [Range(0, 8)]),
        (with_more((4, 5), (6, 7)), False, [Range(2, 6)]),
        (with_more((4, 5), (5, 7)), True, [Range(2, 8)]),
    ],
    ids=["causal", "window", "both ways", "question", "text", "prefix", "all", "and text", "question ahead"],
)
def test_ranges_of_one_prompt(
    alone: CheckedGraph, mask: Tensor, is_causal: bool, ranges: list[Range]
) -> None:
    summary = alone([BOTH[0]], mask_0=mask[None, None], mask_1=mask[None, None])
    assert (summary.is_causal, list(summary.bidirectional[0])) == (is_causal, ranges)
    assert (summary.refusal is None) == (is_causal or not ranges)


def test_ranges_join_layers(alone: CheckedGraph) -> None:
    masks = with_more((4, 5))[None, None], with_more((5, 6))[None, None]
    assert alone([BOTH[0]], mask_0=masks[0], mask_1=masks[1]).bidirectional == ((Range(2, 7),),)


def test_ranges_not_allowed_are_refused(alone: CheckedGraph) -> None:
    mask = with_more((4, 5))[None, None]
    allowed = alone.check._allows_ranges
    alone.check._summaries.clear()
    alone.check._allows_ranges = False
    try:
        summary = alone([BOTH[0]], mask_0=mask, mask_1=mask)
    finally:
        alone.check._allows_ranges = allowed
        alone.check._summaries.clear()
    assert summary.refusal is not None
    assert summary.bidirectional == ((),)


def test_accepts_text_that_attends_to_later(checked: tuple[CheckedGraph, bool]) -> None:
    check, additive = checked
    mask = for_both(with_more((6, 7)), CAUSAL, additive=additive)
    summary = check(mask_0=mask, mask_1=mask)
    assert (summary.refusal, summary.is_causal) == (None, False)


def test_summaries_are_cached_by_content(checked: tuple[CheckedGraph, bool]) -> None:
    check, additive = checked
    mask = for_both(hiding(1), CAUSAL, additive=additive)
    summary = check(mask_0=mask, mask_1=mask)
    again = mask.clone()
    assert check(mask_0=again, mask_1=again, pixel_values=CALL["pixel_values"] + 1) is summary
    assert check([BOTH[0], []]) is not summary
    again[1, 0, :, 0] = mask[0, 0, 0, 1]  # written in place
    assert padding(check()) == [[1], [0]]
    assert check(mask_0=mask, mask_1=mask) is summary


def test_summaries_are_bounded(checked: tuple[CheckedGraph, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    check, additive = checked
    monkeypatch.setattr(mask_check, "MAX_SUMMARIES", 2)
    check.check._summaries.clear()
    masks = [for_both(hiding(place), CAUSAL, additive=additive) for place in range(3)]
    first, second, third = (check(mask_0=mask, mask_1=mask) for mask in masks)
    assert check(mask_0=masks[2], mask_1=masks[2]) is third
    assert check(mask_0=masks[1], mask_1=masks[1]) is second
    assert check(mask_0=masks[0], mask_1=masks[0]) is not first


def test_mask_for_all_samples() -> None:
    mask = for_both(hiding(0))
    assert padding(CheckedGraph(mask_0=mask, mask_1=mask)()) == [[0], [0]]


def test_layers_with_different_masks() -> None:
    """Padding is hidden in all layers; one layer is enough for a refusal."""
    check = CheckedGraph(mask_0=for_both(hiding(0, 1), CAUSAL), mask_1=for_both(hiding(1), hiding(0)))
    assert padding(check()) == [[1], []]
    assert check(mask_1=for_both(CAUSAL, with_more((3, 6)))).refusal is not None
    assert not check(mask_1=for_both(CAUSAL, with_more((0, 1)))).is_causal


def test_layer_without_mask() -> None:
    check = CheckedGraph(mask_0=for_both(hiding(0), CAUSAL))
    summary = check()
    assert summary.padding == (None, None)
    assert check(mask_0=for_both(with_more((3, 6)), CAUSAL)).refusal is not None
    plain = MaskSummary(
        padding=(None, None),
        shown_to_spans=(("causal",),) * 2,
        shown_to_tokens=(None, None),
        bidirectional=((), ()),
    )
    assert CheckedGraph()() == plain


def test_keys_of_earlier_calls() -> None:
    def wider(past: Tensor) -> Tensor:
        return torch.cat([past.expand(2, 1, TOKENS, 3), for_both(hiding(0), CAUSAL)], -1)

    past = torch.zeros(2, 1, 3, 8)
    seen, hidden = wider(torch.tensor([True, False, True])), wider(torch.tensor(False))
    check = CheckedGraph(mask_0=seen, mask_1=seen, past=past)
    summary = check()
    assert (summary.refusal, summary.is_causal, summary.ignores_past) == (None, True, False)
    assert padding(summary) == [[0], []]
    assert check(mask_0=hidden, mask_1=hidden).ignores_past
    assert not check(mask_0=hidden, mask_1=seen).ignores_past
