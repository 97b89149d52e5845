"""What is asked: four requests per round about one photo, and other photos that pass in between."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.vs_vllm.checkpoint import IMAGE, MERGE, PATCH, VISION_END, VISION_START, WORDS

CASES = {
    "first": "first time",
    "same": "very same prompt again",
    "moved": "other system prompt",
    "evicted": "same start, other question, encoder entry evicted",
}
"""In the order in which a round asks them; before the last one, the other photos pass."""

SHORT, LONG = 48, 80
"""Tokens of text before and after the photo; the other way round in ``moved``. So the photo moves there, and
all requests are equally long (with 4,096 vision tokens: 4,226)."""

MOST_ROUNDS, MOST_OTHERS = 10_000, 256


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        before, after: ids of the text around the photo.
        photo: file of its pixels (``.npy``, bytes ``[height, width, 3]``).
        vision_tokens: how many the photo makes.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    photo: Path
    vision_tokens: int

    def ids(self, placeholders: int) -> list[int]:
        """The ids with ``placeholders`` in the photo's place: vLLM takes one and widens it itself."""
        return [*self.before, VISION_START, *[IMAGE] * placeholders, VISION_END, *self.after]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt, vision tokens included."""
        return len(self.ids(self.vision_tokens))


@dataclasses.dataclass(frozen=True)
class Round:
    """The requests per case, and the other photos' requests."""

    cases: dict[str, Request]
    others: tuple[Request, ...]


@dataclasses.dataclass(frozen=True)
class Script:
    """Makes rounds; the same ones for the same arguments, each with photos and texts of its own.

    Attributes:
        vision_tokens: per photo.
        vocabulary: of the model.
        others: other photos per round.
        folder: where photos are written.
    """

    vision_tokens: int
    vocabulary: int
    others: int
    folder: Path

    def round(self, number: int) -> Round:
        """Round ``number``, from 0.

        Raises:
            ValueError: the number of vision tokens makes no reasonable photo, or the round's is too large.
        """
        draw = np.random.default_rng(number)
        photo = self._write_photo(number, 0)
        system, other_system = self._text(draw, SHORT), self._text(draw, LONG)
        question, other_question = self._text(draw, LONG), self._text(draw, LONG)
        cases = {
            "first": self._request(system, question, photo),
            "same": self._request(system, question, photo),
            # Its question is the beginning of the first one's, so that all of the prompt's parts recur.
            "moved": self._request(other_system, question[:SHORT], photo),
            "evicted": self._request(system, other_question, photo),
        }
        others = tuple(
            self._request(self._text(draw, SHORT), question, self._write_photo(number, 1 + index))
            for index in range(self.others)
        )
        return Round(cases, others)

    def _text(self, draw: np.random.Generator, length: int) -> tuple[int, ...]:
        return tuple(draw.integers(WORDS, self.vocabulary, length).tolist())

    def _request(self, before: tuple[int, ...], after: tuple[int, ...], photo: Path) -> Request:
        return Request(before, after, photo, self.vision_tokens)

    def _write_photo(self, number: int, index: int) -> Path:
        path = self.folder / f"photo-{number}-{index}.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(path, varied_photo(photo_grid(self.vision_tokens), number, index))
        return path


def photo_grid(vision_tokens: int) -> tuple[int, int]:
    """Rows and columns of vision tokens, as near to a square as the number allows.

    Raises:
        ValueError: only a strip of more than 4 : 1 has that many.
    """
    rows = next((n for n in range(math.isqrt(max(vision_tokens, 0)), 0, -1) if vision_tokens % n == 0), 0)
    if rows == 0 or vision_tokens > 4 * rows**2:
        raise ValueError(f"{vision_tokens} vision tokens make no grid of at most 4 : 1; try a square number")
    return rows, vision_tokens // rows


def varied_photo(grid: tuple[int, int], number: int, index: int) -> NDArray[np.uint8]:
    """A real photo ``[height, width, 3]`` that fills ``grid``; another one for every round and index.

    They are one photo, shifted across its left and right edge, so that nearly every patch differs; the first
    pixel holds the two numbers, so that no two are equal even where shifts agree.

    Raises:
        ValueError: there are too many rounds or photos to make all of them different.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    if not 0 <= number < MOST_ROUNDS or not 0 <= index < MOST_OTHERS:
        raise ValueError(f"round {number}, photo {index}: at most {MOST_ROUNDS} and {MOST_OTHERS}")
    side = PATCH * MERGE
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((grid[1] * side, grid[0] * side))
    shifted = np.roll(
        np.asarray(photo, dtype=np.uint8), (37 * number + 11 * index) % (grid[1] * side), axis=1
    )
    shifted[0, 0] = (number % 100, number // 100, index)
    return shifted
