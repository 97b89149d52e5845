"""Pages, JSON and text of hand-made explanations."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.layer_graph import LayerGraph, NodeLine
from vlcache_fx.errors import Reason
from vlcache_fx.explaining.explained_call import SampleExplanation
from vlcache_fx.explaining.explanation import Explanation
from vlcache_fx.explaining.graph_view import layer_section, pairs
from vlcache_fx.explaining.numbers import bytes_text, flops_text, ms_text, seconds_text, short_key
from vlcache_fx.explaining.prediction import Prediction, Predictions
from vlcache_fx.explaining.tokens import TokenClass, TokenRange
from vlcache_fx.runtime.observation import ranges_of

from .examples import COUNTS, hand_made

VOID = {"meta", "br", "rect", "path"}


class Checker(HTMLParser):
    """Checks that tags are closed in order, and collects their names."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href"), value
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(explanation: Explanation) -> Checker:
    page = explanation.to_html()
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "url(" not in page
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    return checker


def counts_of(page: str) -> dict[str, int]:
    found = re.findall(r'data-count="([a-z]+)">([\d,]+)<', page)
    return {name: int(number.replace(",", "")) for name, number in found}


def shown(explanation: Explanation, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(explanation)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_json_and_page_have_the_same_counts() -> None:
    explanation = hand_made()
    data = json.loads(explanation.to_json())
    assert data["counts"] == COUNTS == counts_of(explanation.to_html())
    text = shown(explanation)
    for kind, number in COUNTS.items():
        assert re.search(rf" {number}  {re.escape(TokenClass(kind).label)}", text)


def test_page_has_all_sections() -> None:
    text = checked(hand_made()).text
    for part in ("Tokens and rows", "Time to the first token", "Store hits", "Not reused, and why"):
        assert part in text
    assert "image at token 12" in text
    assert "its donor was evicted to make room (memory tier)" in text
    assert "raise capacity_bytes, or add a tier" in text
    assert "tokens 4 to 9" in text
    assert "10 min ago" in text
    assert "11.5 ms" in text  # of all stages


def test_user_text_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    explanation = hand_made(texts=(evil, *("a",) * 19))
    checker = checked(explanation)
    assert evil in checker.text
    assert evil not in explanation.to_html()
    assert evil not in explanation._repr_html_()
    layer = LayerGraph(0, 1, (NodeLine("n", evil, evil, evil, ("frontier",)),), ())
    drawn = layer_section(GraphExplanation("decoder", layer=layer))
    assert "<script" not in drawn
    refused = Explanation((GraphExplanation("unmodified", evil, reason_code=Reason.UNKNOWN_OP),))
    assert evil in checked(refused).text


def test_refused_graph_has_a_page_with_advice() -> None:
    graph = GraphExplanation("unmodified", "graph not supported", reason_code=Reason.RANDOM)
    explanation = Explanation((graph,))
    assert [found.advice for found in explanation.refusals] == ["`model.eval()`"]
    assert "model.eval()" in checked(explanation).text
    assert "do: `model.eval()`" in shown(explanation)
    assert explanation.mode == "unknown"


def test_predictions_are_drawn() -> None:
    bound = Prediction(2e9, 1024, 20.0, "compute")
    from dataclasses import replace

    explanation = replace(hand_made(), predictions=Predictions(bound, replace(bound, ms=4.0), "as measured"))
    text = checked(explanation).text
    assert "full computation, bound" in text
    assert "20.0 ms" in text
    assert "4.00 ms" in text
    assert "as measured" in text
    assert "not predicted" in checked(hand_made()).text


def test_long_prompt_has_a_small_page() -> None:
    torch.manual_seed(0)
    rows = tuple(ranges_of(torch.randperm(8000)[:2000].sort().values) for _ in range(60))
    kinds = (TokenClass.TEXT, TokenClass.REUSED, TokenClass.RECOMPUTED)
    ranges = tuple(TokenRange(kinds[index % 3], 4 * index, 4 * index + 4) for index in range(2000))
    sample = SampleExplanation(8000, 0, ranges, rows, tuple(range(8000)), ("token ",) * 8000)
    page = Explanation((), samples=(sample,)).to_html()
    assert len(page) < 1_000_000
    assert counts_of(page) == {"text": 2668, "reused": 2668, "recomputed": 2664}


def test_batches_are_drawn_in_part() -> None:
    sample = hand_made().samples[0]
    text = checked(Explanation((), samples=(sample,) * 6)).text
    assert "Prompt 3: " in text
    assert "Prompt 4: " not in text
    assert "2 more prompts are not drawn" in text


def test_pairs_align_nodes_by_name() -> None:
    before = tuple(NodeLine(name, name) for name in "abc")
    after = tuple(NodeLine(name, name) for name in "xacy")
    found = [
        (None if old is None else old.name, None if new is None else new.name)
        for old, new in pairs(LayerGraph(0, 1, before, after))
    ]
    assert found == [(None, "x"), ("a", "a"), ("b", None), ("c", "c"), (None, "y")]


def test_save(tmp_path: Path) -> None:
    explanation = hand_made()
    explanation.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == explanation.to_html()


def test_texts_of_given_ids() -> None:
    explanation = hand_made().with_texts(lambda ids: f"<{ids[0]}>", [list(range(20))])
    assert explanation.samples[0].texts[3] == "<3>"
    assert hand_made().with_texts(str, [[1, 2]]).samples[0].texts == ()  # of another length


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ms_text(0.4123), "0.412 ms"),
        (ms_text(1234), "1.23 s"),
        (seconds_text(59.6), "60 s"),
        (seconds_text(7300), "2 h"),
        (seconds_text(1e6), "12 d"),
        (bytes_text(1000), "1000 B"),
        (bytes_text(3 * 2**30), "3.0 GiB"),
        (flops_text(2.5e9), "2.5 GFLOP"),
        (flops_text(5e13), "50.0 TFLOP"),
        (short_key("donor-aa-bb-0123456789abcdef"), "donor 0123456789ab"),
        (short_key("plain"), "plain"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected
