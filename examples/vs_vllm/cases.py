"""Requests of the comparison: four per round about one photo, with other photos in between."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.vs_vllm.checkpoint import IMAGE, MERGE, PATCH, VISION_END, VISION_START, WORDS

CASES = {
    "first": "first time",
    "same": "identical prompt",
    "moved": "other system prompt",
    "evicted": "same start, other question, encoder entry evicted",
}
"""In the order of a round; the other photos are requested before the last case."""

SHORT, LONG = 48, 80
"""Text tokens before and after the photo; swapped in ``moved``, which moves the photo and keeps the length
(4,226 tokens with 4,096 vision tokens)."""

MAX_ROUNDS, MAX_OTHERS = 10_000, 256


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        before, after: ids of the text around the photo.
        photo: file of the photo's pixels (``.npy``, bytes ``[height, width, 3]``).
        vision_tokens: number of the photo's tokens.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    photo: Path
    vision_tokens: int

    def ids(self, placeholders: int) -> list[int]:
        """Return the ids with ``placeholders`` image tokens; vLLM expects one and expands it."""
        return [*self.before, VISION_START, *[IMAGE] * placeholders, VISION_END, *self.after]

    @property
    def num_tokens(self) -> int:
        """Length of the prompt, with vision tokens."""
        return len(self.ids(self.vision_tokens))


@dataclasses.dataclass(frozen=True)
class Round:
    """Requests per case, and requests about other photos."""

    cases: dict[str, Request]
    others: tuple[Request, ...]


@dataclasses.dataclass(frozen=True)
class Script:
    """Creates rounds, deterministically; each has new photos and texts.

    Attributes:
        vision_tokens: tokens per photo.
        vocabulary: size of the model's vocabulary.
        others: number of other photos per round.
        folder: folder for photos.
    """

    vision_tokens: int
    vocabulary: int
    others: int
    folder: Path

    def round(self, number: int) -> Round:
        """Create round ``number``, from 0.

        Raises:
            ValueError: no photo has this number of vision tokens, or ``number`` is too large.
        """
        draw = np.random.default_rng(number)
        photo = self._write_photo(number, 0)
        system, other_system = self._text(draw, SHORT), self._text(draw, LONG)
        question, other_question = self._text(draw, LONG), self._text(draw, LONG)
        cases = {
            "first": self._request(system, question, photo),
            "same": self._request(system, question, photo),
            # Its question is a prefix of the first request's: all parts of the prompt recur.
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
    """Return rows and columns of the most square grid of vision tokens.

    Raises:
        ValueError: all grids are longer than 4 : 1.
    """
    rows = next((n for n in range(math.isqrt(max(vision_tokens, 0)), 0, -1) if vision_tokens % n == 0), 0)
    if rows == 0 or vision_tokens > 4 * rows**2:
        raise ValueError(
            f"vision_tokens={vision_tokens}: no grid has a ratio of at most 4 : 1; try a square number"
        )
    return rows, vision_tokens // rows


def varied_photo(grid: tuple[int, int], number: int, index: int) -> NDArray[np.uint8]:
    """Return a real photo ``[height, width, 3]`` that fills ``grid``, different for every round and index.

    All are cyclic shifts of one photo, so that nearly every patch differs; the first pixel encodes both
    numbers, so that photos differ even for equal shifts.

    Raises:
        ValueError: too many rounds or photos.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_image

    if not 0 <= number < MAX_ROUNDS or not 0 <= index < MAX_OTHERS:
        raise ValueError(f"round {number}, photo {index}: at most {MAX_ROUNDS} and {MAX_OTHERS}")
    side = PATCH * MERGE
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((grid[1] * side, grid[0] * side))
    shifted = np.roll(
        np.asarray(photo, dtype=np.uint8), (37 * number + 11 * index) % (grid[1] * side), axis=1
    )
    shifted[0, 0] = (number % 100, number // 100, index)
    return shifted
