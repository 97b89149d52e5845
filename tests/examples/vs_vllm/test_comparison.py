import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from examples.vs_vllm.answer import Answer, FloatArray, Peer
from examples.vs_vllm.cases import CASES, Request, Script
from examples.vs_vllm.comparison import (
    EAGER,
    VLCACHE,
    VLLM,
    WARM_UP_ROUNDS,
    Comparison,
    Difference,
    compare,
)
from examples.vs_vllm.errors import PeerError
from examples.vs_vllm.table import comparison_table, notes


class FakePeer:
    """Answers at once; caches photos, and the encoder outputs of the last two."""

    def __init__(self, keeps: bool, seconds: float, encoder_entries: int = 2) -> None:
        self._keeps, self._seconds, self._entries = keeps, seconds, encoder_entries
        self.photos: list[Path] = []
        self.encoded: list[Path] = []

    @property
    def keeps(self) -> bool:
        return self._keeps

    def ask(self, request: Request) -> Answer:
        known = self._keeps and request.photo in self.photos
        skipped = self._keeps and request.photo in self.encoded
        if not skipped:
            self.encoded = [*self.encoded, request.photo][-self._entries :]
        self.photos.append(request.photo)
        rows = 2 if known else request.num_tokens
        return Answer(self._seconds, self._seconds / 2, request.num_tokens, rows, int(not skipped), "exact")

    def logprobs(self, request: Request) -> FloatArray:
        self.ask(request)
        return np.log(np.array([0.5, 0.25, 0.25], np.float32))

    def close(self) -> None:
        pass


def fakes(**changes: Peer) -> dict[str, Peer]:
    peers: dict[str, Peer] = {
        VLLM: FakePeer(True, 3.0),
        VLCACHE: FakePeer(True, 1.5, encoder_entries=9),
        EAGER: FakePeer(False, 6.0),
    }
    return peers | changes


def script(folder: Path, others: int = 2) -> Script:
    return Script(vision_tokens=4, vocabulary=64, others=others, folder=folder)


@pytest.fixture
def result(tmp_path: Path) -> Comparison:
    return compare(fakes(), script(tmp_path), rounds=2)


def test_compare_answers_per_case_and_round(result: Comparison) -> None:
    assert list(result.answers) == list(CASES)
    assert set(result.answers["first"]) == {VLLM, VLCACHE, EAGER}
    assert set(result.answers["same"]) == {VLLM, VLCACHE}
    assert {len(answers) for found in result.answers.values() for answers in found.values()} == {2}


def test_compare_evicts_the_encoder_entry(result: Comparison) -> None:
    runs = {case: found[VLLM][0].encoder_runs for case, found in result.answers.items()}
    assert runs == {"first": 1, "same": 0, "moved": 0, "evicted": 1}
    assert result.answers["evicted"][VLCACHE][0].encoder_runs == 0


def test_compare_same_requests_for_all(tmp_path: Path) -> None:
    vllm, vlcache = FakePeer(True, 1.0), FakePeer(True, 1.0)
    compare(fakes(vllm=vllm, vlcache=vlcache), script(tmp_path), rounds=1)
    assert vllm.photos == vlcache.photos
    assert len(vllm.photos) == (WARM_UP_ROUNDS + 1) * (len(CASES) + 2)


def test_ratio_of_vllm_to_library(result: Comparison) -> None:
    assert result.ratio("same", VLCACHE).median == 2
    assert result.ratio("first", EAGER).median == 0.5
    assert result.seconds("same", VLCACHE, patches=True) == [0.75, 0.75]


def test_comparison_is_json(result: Comparison) -> None:
    record = json.loads(json.dumps(result.as_dict()))
    assert record["vllm_over"]["moved"][VLCACHE]["pixels"]["median"] == 2
    assert record["answers"]["first"][EAGER][0]["computed_tokens"] == result.num_tokens
    assert record["differences"]["first"][VLLM] == {"largest": 0, "divergence": 0, "same_token": True}


def test_compare_known_photo_in_first_case(tmp_path: Path) -> None:
    class Knowing(FakePeer):
        def ask(self, request: Request) -> Answer:
            return dataclasses.replace(super().ask(request), computed_tokens=2)

    with pytest.raises(PeerError, match="vlcache: a request with a new photo computed 2 of"):
        compare(fakes(vlcache=Knowing(True, 1.0)), script(tmp_path), rounds=1)


def test_compare_encoder_entry_not_evicted(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="still contains"):
        compare(fakes(vllm=FakePeer(True, 1.0, encoder_entries=99)), script(tmp_path), rounds=1)


def test_difference_between() -> None:
    p, q = (np.log(np.array(values, np.float32)) for values in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    found = Difference.between(p, q)
    assert found.largest == pytest.approx(np.log(2))
    assert found.divergence == pytest.approx(0.25 * np.log(2))
    assert not found.same_token
    with pytest.raises(PeerError, match="of 3 and 2 tokens"):
        Difference.between(p, q[:2])


def test_comparison_table_cases_and_libraries(result: Comparison) -> None:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(comparison_table(result, 247_000_000, "bfloat16"))
    text = capture.get()
    for label in (
        "first time",
        "identical prompt",
        "vLLM",
        "vlcache_fx",
        "transformers (sdpa)",
        "247 M",
        "skipped",
    ):
        assert label in text
    assert re.search(r"vLLM +│ +3,000 ms │ +3,000-3,000", text)
    assert "another photo" in notes(result)
