"""Media spans in the inputs of a graph, and donor keys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlcache_fx.analysis import analyze
from vlcache_fx.compiler.builders.decoder import describe_decoder
from vlcache_fx.compiler.builders.on_cpu import evaluated_on_cpu
from vlcache_fx.compiler.builders.spans import span_masks
from vlcache_fx.ir import InputKind
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.keys.entry_key import KeyScope
from vlcache_fx.runtime.requests.input_values import InputValues
from vlcache_fx.runtime.requests.media_spans import MediaItems, MediaSpan, media_spans_of, merged_grid
from vlcache_fx.runtime.requests.spans import Identifier, donor_key
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.prompts import IMAGE_TOKEN, VOCABULARY, noise
from vlcache_fx.testing.tiny_attention import causal_mask, rotary_angles
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm

HIDDEN = 16


class Taking(TinyVlm):
    """Takes features; other inputs depend on the call."""

    table: nn.Embedding

    def forward(self, input_ids: Tensor, features: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), features)
        tokens, mask = x.shape[1], causal_mask(x.shape[1], x.device)
        if "kept" in more:
            mask = mask & (more["kept"] != 0)[:, None, None, :]
        if "bias" in more:
            mask = mask & more["bias"]
        rotary = rotary_angles(more.get("position_ids", torch.arange(tokens)), 8)
        for layer in self.decoder.layers:
            x = layer(x, rotary, mask)
            if "deep" in more:
                x = x + torch.ops.vlcache.scatter_rows(more["deep"], more.get("deep_mask", image))
            if "ids_of_layers" in more:
                x = x + self.table(more["ids_of_layers"])
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits


class Identifying:
    """The identifier and the input values of a graph, and its inputs by name."""

    def __init__(self, **call: Tensor) -> None:
        model: Any = tiny_vlm(cls=Taking, last_only=False)
        model.table = nn.Embedding(VOCABULARY, HIDDEN)
        captured, graph = captured_graph(model, call)
        self.decoder = decoder = describe_decoder(captured, analyze(captured), ())
        prologue = decoder.prologue()
        self.identifier = Identifier(decoder.spec.spans, prologue.spans)
        self.input_values = InputValues(decoder.spec.leaves, prologue.input_values)
        self.args = list(graph.calls[0])
        self.place = {
            name: next(index for index, arg in enumerate(self.args) if arg is value)
            for name, value in call.items()
        }

    def read_on_cpu(self) -> tuple[int, ...]:
        """Return the inputs that the program ``spans`` reads on the CPU."""
        captured = self.decoder.captured
        part = extract(captured.graph_module, span_masks(self.decoder.facts))
        return evaluated_on_cpu(part, captured.indices_of(InputKind.DATA))[1]

    def with_changes(self, changes: dict[str, Tensor]) -> list[Any]:
        args = list(self.args)
        for name, value in changes.items():
            args[self.place[name]] = value
        return args

    def media_spans(
        self, items: list[list[int]] | None = None, **changes: Tensor
    ) -> tuple[int, int, list[MediaSpan]] | None:
        encoded = [MediaItems(tuple(lengths)) for lengths in items or ()]
        return self.identifier.media_spans(self.with_changes(changes), encoded)

    def found(self, items: list[list[int]] | None = None, **changes: Tensor) -> list[tuple[int, int, int]]:
        """Return ``(sample, start, length)`` of each media span."""
        identified = self.media_spans(items, **changes)
        assert identified is not None
        return [(span.sample, span.start, span.length) for span in identified[2]]

    def positions(self, number: int = 0, **changes: Tensor) -> list[Any]:
        """Return the input values at the tokens of one media span."""
        args = self.with_changes(changes)
        identified = self.identifier.media_spans(args)
        assert identified is not None
        _, tokens, media_spans = identified
        span = media_spans[number]
        return self.input_values.of_item(
            self.input_values.read(args), span.sample, span.start, span.length, tokens
        )[1]


def ids(*prompts: str) -> Tensor:
    """Return a token per character: ``o`` for an image, others for text."""
    tokens = [[IMAGE_TOKEN if letter == "o" else ord(letter) for letter in prompt] for prompt in prompts]
    return torch.tensor(tokens)


TWO = ids("aooobboo", "oobooocc")
"""An item ends the first sample, and another begins the second."""


@pytest.fixture(scope="module")
def two(_compiler: None) -> Identifying:
    return Identifying(input_ids=TWO, features=noise(0, 10, HIDDEN), deep=noise(1, 10, HIDDEN))


# Media spans ------------------------------------------------------------------------------------------------


def test_media_spans_of_each_sample(two: Identifying) -> None:
    identified = two.media_spans()
    assert identified is not None
    samples, tokens, media_spans = identified
    assert (samples, tokens) == (2, 8)
    assert [(span.sample, span.start, span.end) for span in media_spans] == [
        (0, 1, 4),
        (0, 6, 8),
        (1, 0, 2),
        (1, 3, 6),
    ]
    first = 0
    for span in media_spans:
        features, *deep = span.content
        assert torch.equal(features, noise(0, 10, HIDDEN)[first : first + span.length])
        assert len(deep) == 2  # one per layer
        for added in deep:
            assert torch.equal(added, noise(1, 10, HIDDEN)[first : first + span.length])
        first += span.length


def test_span_masks_are_computed_on_cpu(two: Identifying) -> None:
    assert two.read_on_cpu() == (two.place["input_ids"],)
    flags = Identifying(
        input_ids=TWO, features=noise(0, 10, HIDDEN), deep=noise(1, 10, HIDDEN), deep_mask=TWO == IMAGE_TOKEN
    )
    assert set(flags.read_on_cpu()) == {flags.place["input_ids"], flags.place["deep_mask"]}


def test_media_spans_without_text_between(two: Identifying) -> None:
    whole = [(0, 1, 3), (0, 6, 2), (1, 0, 2), (1, 3, 3)]
    assert two.found() == whole
    assert two.found([[3, 2, 2, 3]]) == whole
    assert two.found([[1, 2, 2, 2, 3]]) == [(0, 1, 1), (0, 2, 2), *whole[1:]]
    assert two.found([[4, 4], [3, 2, 2, 1, 2]]) == [*whole[:3], (1, 3, 1), (1, 4, 2)]
    assert two.found([[1, 2, 3]]) == whole  # another modality
    assert two.found([[3, 4, 3]]) == whole  # items end with the sample


def test_media_spans_of_mismatched_features(two: Identifying) -> None:
    assert two.media_spans(features=noise(0, 9, HIDDEN)) is None
    assert two.media_spans(features=noise(0, 10, HIDDEN // 2)) is None
    assert two.media_spans(deep=noise(1, 11, HIDDEN)) is None
    one_less = TWO.clone()
    one_less[0, 1] = 7
    assert two.media_spans(input_ids=one_less) is None
    assert two.found(input_ids=TWO.flip(0)) == [(0, 0, 2), (0, 3, 3), (1, 1, 3), (1, 6, 2)]


def test_media_spans_with_deepstack_outside() -> None:
    image = TWO == IMAGE_TOKEN
    check = Identifying(
        input_ids=TWO, features=noise(0, 10, HIDDEN), deep=noise(1, 10, HIDDEN), deep_mask=image
    )
    assert len(check.found()) == 4
    assert check.media_spans(deep_mask=image.roll(1, 1)) is None
    # At fewer tokens, each media span has its own deepstack rows.
    image = image.clone()
    image[0, 1:3] = False
    identified = check.media_spans(deep_mask=image, deep=noise(1, 8, HIDDEN))
    assert identified is not None
    assert [len(span.content[1]) for span in identified[2]] == [1, 2, 2, 3]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3), st.data())
@settings(max_examples=100)
def test_media_spans_of_consecutive_positions(flags: list[list[bool]], data: st.DataObject) -> None:
    places = torch.tensor(flags).flatten().nonzero().flatten()
    features = torch.arange(len(places))[:, None]
    cuts = data.draw(st.sets(st.integers(1, max(1, len(places) - 1)))) if len(places) > 1 else set()
    bounds = [0, *sorted(cuts), len(places)]
    lengths = [b - a for a, b in pairwise(bounds)] if data.draw(st.booleans()) else []
    want: list[list[int]] = []
    for number, place in enumerate(places.tolist()):
        joins = want and want[-1][-1] == place - 1 and place % 5 != 0 and not (lengths and number in cuts)
        want[-1].append(place) if joins else want.append([place])
    media_spans = media_spans_of(places, features, 5, MediaItems(tuple(lengths)))
    assert [[span.sample * 5 + span.start + i for i in range(span.length)] for span in media_spans] == want
    assert [row for span in media_spans for row in span.content[0].flatten().tolist()] == list(
        range(len(places))
    )


@pytest.mark.parametrize("lengths", [(0, 2, 3), (2, 3, 0), (2, 0, 3)])
def test_media_spans_of_empty_items(lengths: tuple[int, ...]) -> None:
    media_spans = media_spans_of(torch.arange(5) + 1, noise(0, 5, HIDDEN), 8, MediaItems(lengths))
    assert [(span.start, span.length) for span in media_spans] == [(1, 2), (3, 3)]


def test_media_spans_have_grids() -> None:
    """A media span has the grid of its item where it is the whole item."""
    items = MediaItems((4, 6, 2), ((1, 2, 2), (1, 2, 3), None))
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13])  # a gap inside the second item
    found = media_spans_of(positions, noise(0, 12, HIDDEN), 20, items)
    assert [(span.start, span.length, span.grid) for span in found] == [
        (0, 4, (1, 2, 2)), (4, 3, None), (8, 3, None), (12, 2, None)
    ]  # fmt: skip
    (alone,) = media_spans_of(torch.arange(6), noise(0, 6, HIDDEN), 20, MediaItems((6,), ((1, 2, 3),)))
    assert alone.grid == (1, 2, 3)


@pytest.mark.parametrize(
    ("patches", "length", "grid"),
    [
        ((1, 4, 6), 6, (1, 2, 3)),
        ((1, 4, 6), 24, (1, 4, 6)),
        ((2, 4, 6), 12, (2, 2, 3)),
        ((1, 6, 9), 6, (1, 2, 3)),
        ((1, 4, 6), 12, None),  # not a square of patches
        ((1, 3, 6), 4, None),
        ((4, 6), 6, None),
        ((1, 4, 6), 0, None),
        ((1, 4, 6), 100, None),
    ],
)
def test_merged_grid(patches: tuple[int, ...], length: int, grid: tuple[int, int, int] | None) -> None:
    assert merged_grid(patches, length) == grid


def test_media_items_of_patches() -> None:
    assert MediaItems.of_patches([6, 5], [[1, 4, 6], [1, 4, 6]]).grids == ((1, 2, 3), None)
    assert MediaItems.of_patches([6, 5], [[1, 4, 6]]) == MediaItems((6, 5))


# Positions --------------------------------------------------------------------------------------------------

ONE = {"input_ids": ids("aoooobcc"), "features": noise(0, 4, HIDDEN)}


@pytest.fixture(scope="module")
def placed(_compiler: None) -> Identifying:
    return Identifying(**ONE, position_ids=torch.arange(8))


@pytest.mark.parametrize(
    ("positions", "part"),
    [
        (range(8), [0, 1, 2, 3]),
        (range(100, 108), [0, 1, 2, 3]),
        ([0, 1, 1, 1, 1, 2, 3, 4], [0, 0, 0, 0]),  # a still image in time
        ([0, 1, 1, 2, 2, 3, 4, 5], [0, 0, 1, 1]),  # rows of a grid
        ([5, 6, 6, 7, 7, 0, 4, 5], [0, 0, 1, 1]),
        ([0, 1, 2, 1, 2, 3, 4, 5], [0, 1, 0, 1]),
    ],
    ids=str,
)
def test_positions_are_relative(placed: Identifying, positions: Any, part: list[int]) -> None:
    found = placed.positions(position_ids=torch.tensor(positions))
    assert [one.flatten().tolist() for one in found] == [part]


def test_computed_positions_equal_given_positions(placed: Identifying) -> None:
    (made,), (given_,) = Identifying(**ONE).positions(), placed.positions()
    assert torch.equal(made, given_)


def test_embedding_indices_are_not_relative() -> None:
    check = Identifying(**ONE, ids_of_layers=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]))
    assert [spec.is_index for spec in check.decoder.spec.leaves if spec.is_beside] == [False, True]
    assert [one.flatten().tolist() for one in check.positions()] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    same = torch.full((1, 8), 9)
    assert check.positions(ids_of_layers=same)[1].flatten().tolist() == [9] * 4


def test_inputs_of_masks_are_no_input_values() -> None:
    """Masks enter keys as text, see ``test_mask_view.py``."""
    kept = torch.ones(1, 8, dtype=torch.bool)
    bias = causal_mask(8, torch.device("cpu"))
    for more in ({}, {"kept": kept}, {"bias": bias}):
        assert len(Identifying(**ONE, **more).positions()) == 1


def test_positions_of_each_sample() -> None:
    positions = torch.tensor([[0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])

    class Counted(Taking):
        def forward(self, input_ids: Tensor, features: Tensor, **more: Tensor) -> Tensor:  # type: ignore[override]
            embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
            x = embeds.masked_scatter(image[..., None].expand_as(embeds), features)
            angles = rotary_angles(more["position_ids"].flatten(), 8)
            rotary = tuple(part.view(2, 1, 8, 8) for part in angles)
            for layer in self.decoder.layers:
                x = layer(x, rotary, causal_mask(8, x.device))
            logits: Tensor = self.decoder.head(self.decoder.norm(x))
            return logits

    model: Any = tiny_vlm(cls=Counted, last_only=False)
    call = {"input_ids": ids("aoooobcc", "abcooooa"), "features": noise(0, 8, HIDDEN)}
    captured, graph = captured_graph(model, call | {"position_ids": positions})
    decoder = describe_decoder(captured, analyze(captured), ())
    input_values = InputValues(decoder.spec.leaves, decoder.prologue().input_values)
    values = input_values.read(graph.calls[0])
    parts = [input_values.of_item(values, sample, start, 4, 8)[1] for sample, start in ((0, 1), (1, 3))]
    assert [part[0].flatten().tolist() for part in parts] == [[0, 0, 1, 1], [0, 1, 2, 3]]


# Keys -------------------------------------------------------------------------------------------------------


def test_donor_key_covers_content(two: Identifying) -> None:
    def keys(**changes: Tensor) -> list[str]:
        identified = two.media_spans(**changes)
        assert identified is not None
        return [donor_key(span, {}, KeyScope("salt", "weights")) for span in identified[2]]

    usual = keys()
    assert len(set(usual)) == 4
    assert keys() == usual
    for name in ("features", "deep"):
        changed = two.args[two.place[name]].clone()
        changed[4] += 1  # of the second media span
        assert [a == b for a, b in zip(keys(**{name: changed}), usual, strict=True)] == [
            True,
            False,
            True,
            True,
        ]
    span = MediaSpan(0, 1, 2, (noise(0, 2, 4),))
    elsewhere = MediaSpan(1, 5, 2, (noise(0, 2, 4),))
    key = donor_key(span, {}, KeyScope("salt", "weights"))
    assert donor_key(elsewhere, {}, KeyScope("salt", "weights")) == key
    others = {
        donor_key(span, {"positions": torch.tensor([0, 1])}, KeyScope("salt", "weights")),
        donor_key(span, {}, KeyScope("salt", "other")),
        donor_key(span, {}, KeyScope("", "weights")),
    }
    assert len(others | {key}) == 4
