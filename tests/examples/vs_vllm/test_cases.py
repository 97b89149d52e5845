from pathlib import Path

import numpy as np
import pytest

from examples.vs_vllm.cases import CASES, LONG, SHORT, Script, photo_grid, varied_photo
from examples.vs_vllm.checkpoint import IMAGE, VISION_END, VISION_START


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(vision_tokens=16, vocabulary=64, others=2, folder=tmp_path / "photos")


@pytest.mark.parametrize(("tokens", "grid"), [(4096, (64, 64)), (1024, (32, 32)), (12, (3, 4)), (1, (1, 1))])
def test_photo_grid_nearly_square(tokens: int, grid: tuple[int, int]) -> None:
    assert photo_grid(tokens) == grid


@pytest.mark.parametrize("tokens", [0, -4, 13, 4099])
def test_photo_grid_rejects_strips(tokens: int) -> None:
    with pytest.raises(ValueError, match="no grid has a ratio"):
        photo_grid(tokens)


def test_varied_photo_fills_its_grid_and_differs() -> None:
    photos = [varied_photo((3, 4), number, index) for number in (0, 1, 112) for index in range(3)]
    assert {photo.shape for photo in photos} == {(84, 112, 3)}
    assert len({photo.tobytes() for photo in photos}) == len(photos)
    assert photos[0].std() > 20  # a photo, no flat colour


def test_varied_photo_limits() -> None:
    with pytest.raises(ValueError, match="at most"):
        varied_photo((1, 1), 0, 256)


def test_round_cases(script: Script) -> None:
    asked = script.round(3)
    first, same, moved, evicted = (asked.cases[case] for case in CASES)
    assert same == first
    assert moved.photo == evicted.photo == first.photo
    assert moved.before[:SHORT] != first.before
    assert (len(first.before), len(moved.before)) == (SHORT, LONG)
    assert evicted.before == first.before
    assert evicted.after[:1] != first.after[:1]
    assert len({request.num_tokens for request in asked.cases.values()}) == 1


def test_round_other_photos_differ(script: Script) -> None:
    asked = script.round(0)
    photos = [asked.cases["first"].photo, *(request.photo for request in asked.others)]
    assert len(asked.others) == 2
    assert len({np.load(photo).tobytes() for photo in photos}) == 3


def test_round_is_reproducible(script: Script) -> None:
    assert script.round(1) == script.round(1)
    assert script.round(1).cases["first"].before != script.round(2).cases["first"].before


def test_request_ids_placeholders(script: Script) -> None:
    request = script.round(0).cases["first"]
    one, widened = request.ids(1), request.ids(16)
    assert one[SHORT : SHORT + 3] == [VISION_START, IMAGE, VISION_END]
    assert widened.count(IMAGE) == 16
    assert len(widened) == request.num_tokens == SHORT + LONG + 18
