"""Results of several selected tokens (``logits_to_keep``), chosen by a number or by indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import Pair, distance, own_compiler_state, with_api, with_backend

pytest.importorskip("transformers")

TOLERANCE = 1e-5
WAYS = ("last", "from the end", "from", "until", "places", "index_select", "single")


class Choosing(nn.Module):
    """A model that returns logits of selected tokens, in one of ``WAYS``."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.vlm = way, tiny_vlm(num_layers=2, last_only=False)
        self.head, self.vlm.decoder.head = self.vlm.decoder.head, nn.Identity()

    def forward(self, input_ids: Tensor, pixel_values: Tensor, keep: Any) -> Tensor:
        logits: Tensor = self.head(self.taken(self.vlm(input_ids, pixel_values), keep))
        return logits

    def taken(self, x: Tensor, keep: Any) -> Tensor:
        match self.way:
            case "last":
                return x[:, -keep:]
            case "from the end":
                return x[:, x.shape[1] - keep :]
            case "from":
                return x[:, keep:]
            case "until":
                return x[:, :keep]
            case "places":
                return x[:, keep, :]
            case "index_select":
                return x.index_select(1, keep)
        return x[:, keep - x.shape[1]]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def choosing(way: str, **options: Any) -> Pair:
    return with_backend(Choosing(way), min_span_tokens=4, **options)


@pytest.mark.parametrize(
    "way",
    [
        way if way in ("last", "from", "places") else pytest.param(way, marks=pytest.mark.thorough)
        for way in WAYS
    ],
)
def test_selected_rows_are_computed(way: str) -> None:
    pair = choosing(way, policy="none")
    first, second = tiny_vlm_inputs(5, 9, [(24, 0)]), tiny_vlm_inputs(11, 9, [(24, 0)], text_seed=1)
    is_tensor = way in ("places", "index_select")
    counts = {"from": (35, 36, 34), "until": (2, 3, 5)}.get(way, (2, 4, 7))
    for number, count in enumerate(counts):
        given = first if number == 0 else second
        keep: Any = torch.tensor([37, 0, 3, 3, 2, 1, 9][:count]) if is_tensor else count
        off, report = pair.run(**given, keep=keep)
        if number == 0:
            assert (report["mode"], off < TOLERANCE) == ("cold", True)
            continue
        assert report["mode"] == "warm", report["reason"]
        rows = report["rows_per_layer"]
        assert rows[-1] < rows[0] <= 24
    with pair.engine.using(policy="full"):
        for count in (20, 33):
            low = -38 if way == "places" else 0
            keep = torch.randint(low, 38, (count,)) if is_tensor else count
            off, report = pair.run(**second, keep=keep)
            assert off < TOLERANCE
            assert report["mode"] == "warm"


def test_selection_of_all_rows_and_none() -> None:
    pair = choosing("last", policy="full")
    given = tiny_vlm_inputs(5, 9, [(24, 0)])
    for keep in (3, 0, 38, 1, 0):
        off, report = pair.run(**given, keep=keep)
        assert off < TOLERANCE
    assert report["mode"] == "warm"


def test_selection_of_single_row() -> None:
    pair = choosing("from", policy="full")
    given = tiny_vlm_inputs(5, 9, [(24, 0)])
    for keep in (30, 36, 37):
        assert pair.run(**given, keep=keep)[0] < TOLERANCE


def test_selection_out_of_range() -> None:
    pair = choosing("places", policy="full")
    given = tiny_vlm_inputs(5, 9, [(24, 0)])
    pair.run(**given, keep=torch.tensor([1, 2, 3]))
    for run in (pair.reference, pair.model):
        with pytest.raises(IndexError), torch.no_grad():
            run(**given, keep=torch.tensor([1, 2, 400]))


def test_selection_is_not_part_of_keys() -> None:
    pair = choosing("last", policy="none")
    given = tiny_vlm_inputs(5, 9, [(24, 0)])
    for keep in (2, 3, 5):
        off, report = pair.run(**given, keep=keep)
        assert off < TOLERANCE
    assert (report["mode"], report["prefix_tokens"]) == ("warm", 38)


@pytest.mark.parametrize("family", [tiny_qwen2_5_vl, pytest.param(tiny_llava, marks=pytest.mark.thorough)])
def test_donors_shared_between_selections(family: Any) -> None:
    pair = with_api(family(1), policy="full", min_span_tokens=4)

    def given(before: int, image: int) -> dict[str, Any]:
        if family is tiny_qwen2_5_vl:
            return qwen_inputs(before, 6, [(8, 8, image)])
        return llava_inputs(before, 6, [image])

    modes = []
    for number, (image, keep) in enumerate([(0, 1), (0, 4), (1, 5), (1, 1), (1, torch.tensor([-1, 2, 3]))]):
        got, expected = pair.both(**given(4 + number, image), logits_to_keep=keep)
        assert distance(got, expected) < TOLERANCE
        modes.append(pair.report["mode"])
        assert pair.report["rows_per_layer"][-1] < pair.report["rows_per_layer"][0]
    assert modes == ["cold", "warm", "cold", "warm", "warm"]


def test_selection_with_inductor() -> None:
    pair = choosing("last", policy="full", lowering="inductor")
    for number, keep in enumerate((4, 9)):
        off, report = pair.run(**tiny_vlm_inputs(5 + number, 9, [(24, 0)]), keep=keep)
        assert off < TOLERANCE
        assert report["mode"] == ("warm" if number else "cold")


@pytest.mark.parametrize("how", [pytest.param("assistant", marks=pytest.mark.thorough), "prompt lookup"])
def test_assisted_decoding_equals_model(how: str) -> None:
    pair = with_api(tiny_qwen2_5_vl(1), policy="full", min_span_tokens=4)
    helper = (
        {"assistant_model": tiny_qwen2_5_vl(1)} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    )
    for before in (4, 9):
        inputs = qwen_inputs(before, 6, [(8, 8, 0)])
        with torch.no_grad():
            answers = [
                model.generate(**inputs, max_new_tokens=6, do_sample=False, **helper)
                for model in (pair.model, pair.reference)
            ]
        assert torch.equal(*answers)
        # Drafts are checked in separate calls; the report is that of the prefill.
        assert pair.report["num_tokens"] >= before + 6 + 16
        assert [span["start"] for span in pair.report["spans"]] == [before + 1]
    calls = pair.engine.stats()["calls"]
    assert (calls["cold"], calls["warm"]) == (1, 1)
