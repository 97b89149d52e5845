"""A graph with a merge marks spans for the decoder's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.compiler.builders.spans import merge_marks
from vlcache_fx.runtime.merge import MergeMarks
from vlcache_fx.runtime.requests.marked_spans import marked_spans
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, hits, own_compiler_state, with_backend


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Cut(TinyVlm):
    """The graph ends after the merge, as in models that build masks that cannot be traced."""

    between: Any = staticmethod(lambda embeds: embeds)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Any:  # type: ignore[override]
        embeds = self.embed(input_ids)
        mask = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(mask, self.encoder(pixel_values))
        torch._dynamo.graph_break()
        return self.decoder(self.between(embeds))


def cut(between: Any = None) -> Any:
    model: Any = tiny_vlm(cls=Cut, last_only=False)
    if between is not None:
        model.between = between
    return model


def reports(pair: Pair, *inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    found = []
    for one in inputs:
        off, report = pair.run(**one)
        assert off == 0.0
        found.append(report)
    return found


def test_moved_image_is_recomputed_exactly() -> None:
    pair = with_backend(cut(), policy="full")
    first, second = reports(
        pair, tiny_vlm_inputs(3, 5, [(20, 0)]), tiny_vlm_inputs(17, 2, [(20, 0)], text_seed=1)
    )
    assert (first["mode"], second["mode"]) == ("cold", "warm")
    assert [(span["start"], span["length"]) for span in second["spans"]] == [(17, 20)]


def test_spans_of_two_images() -> None:
    pair = with_backend(cut(), policy="full")
    reports(pair, tiny_vlm_inputs(3, 5, [(20, 0), (24, 1)]))
    (report,) = reports(pair, tiny_vlm_inputs(9, 5, [(24, 1), (20, 2)]))
    assert [(span["start"], span["length"]) for span in report["spans"]] == [(9, 24), (35, 20)]
    assert hits(report) == [True, False]


def test_copied_embeddings_have_no_marks() -> None:
    pair = with_backend(cut(lambda embeds: torch.cat([embeds], 0) + 0.5), policy="full")
    (report,) = reports(pair, tiny_vlm_inputs(3, 5, [(20, 0)]))
    assert report["mode"] in ("bypass", "cold")
    (report,) = reports(pair, tiny_vlm_inputs(9, 5, [(20, 0)], text_seed=1))
    assert report["mode"] in ("bypass", "warm")


class Merge(torch.nn.Module):
    def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        return x.masked_scatter(mask, features)


def marks_of(model: torch.nn.Module, call: dict[str, Tensor]) -> tuple[MergeMarks | None, tuple[Any, ...]]:
    captured, graph = captured_graph(model, call)
    return merge_marks(captured), graph.calls[0]


def merge_call(batch: int = 1) -> dict[str, Tensor]:
    mask = torch.zeros(batch, 7, 1, dtype=torch.bool)
    mask[:, [1, 2, 5]] = True
    return {
        "x": torch.zeros(batch, 7, 4),
        "mask": mask.expand(batch, 7, 4),
        "features": torch.ones(3 * batch, 4),
    }


def test_marks_media_spans() -> None:
    marks, args = marks_of(Merge(), merge_call())
    assert marks is not None
    results = (torch.zeros(1, 7, 4),)
    assert marks.mark(args, results) is results
    assert marked_spans(results[0]) == ((0, 1, 2), (0, 5, 1))


def test_marks_media_spans_per_sample() -> None:
    marks, args = marks_of(Merge(), merge_call(2))
    assert marks is not None
    (embeds,) = marks.mark(args, (torch.zeros(2, 7, 4),))
    assert marked_spans(embeds) == ((0, 1, 2), (0, 5, 1), (1, 1, 2), (1, 5, 1))


def test_other_graphs_mark_no_spans() -> None:
    class Attending(Merge):
        def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Any:
            x = super().forward(x, mask, features)
            return x, torch.nn.functional.scaled_dot_product_attention(x, x, x)

    class Changing(Merge):
        def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
            return super().forward(x, mask, features) * 2

    assert marks_of(Attending(), merge_call())[0] is None
    assert marks_of(Changing(), merge_call())[0] is None
