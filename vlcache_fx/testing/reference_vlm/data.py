"""Questions about grids of digits, for evaluation and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlcache_fx.testing.reference_vlm.images import COLUMNS, MAX_ROWS, MIN_ROWS, grid_image
from vlcache_fx.testing.reference_vlm.scans import IntArray, Scans, load_scans
from vlcache_fx.testing.reference_vlm.vocabulary import FILLER_WORDS, SYSTEM_SENTENCES

if TYPE_CHECKING:
    from PIL.Image import Image

FAMILIES = ("cell", "count", "where", "same")
MAX_SYSTEM_WORDS = 60
COUNT_REST = 4.0


@dataclass(frozen=True, eq=False)
class Question:
    """One question with its pictures and its answer.

    ``family`` is one of ``FAMILIES``; ``images`` holds one picture, or two for ``"same"``; ``question_first``
    says whether ``text`` stands before the pictures; ``answer`` is a single word. ``digits`` are, per
    picture, the true digits ``[rows, columns]``; ``scan_ids`` likewise the ``load_digits`` ids.
    """

    family: str
    question_first: bool
    system_prompt: str
    text: str
    images: tuple[Image, ...]
    answer: str
    digits: tuple[IntArray, ...]
    scan_ids: tuple[IntArray, ...]


def image_count(family: str) -> int:
    """Return the number of pictures of a question of ``family``."""
    return 2 if family == "same" else 1


def draw_digits(rng: np.random.Generator, count: int, rows: int) -> IntArray:
    """Draw digits ``[count, rows, COLUMNS]``; a random share of each row repeats one digit."""
    shape = (count, rows, COLUMNS)
    planted = rng.integers(10, size=(count, rows, 1))
    share = rng.uniform(0.0, 0.5, size=(count, rows, 1))
    return np.where(rng.random(shape) < share, planted, rng.integers(10, size=shape)).astype(np.int64)


def draw_partner(rng: np.random.Generator, digits: IntArray, rows: int) -> IntArray:
    """Draw a second grid ``[count, rows, COLUMNS]`` that repeats half of the shared cells of ``digits``."""
    partner = draw_digits(rng, len(digits), rows)
    shared = min(rows, digits.shape[1])
    base = digits[:, :shared]
    other = (base + rng.integers(1, 10, size=base.shape)) % 10
    partner[:, :shared] = np.where(rng.random(base.shape) < 0.5, base, other)
    return partner


def draw_scans(rng: np.random.Generator, scans: Scans, digits: IntArray) -> IntArray:
    """Pick a random scan for every digit; return rows of ``scans`` in the shape of ``digits``."""
    chosen = np.empty(digits.shape, np.int64)
    for digit in range(10):
        mask = digits == digit
        chosen[mask] = rng.choice(scans.of_digit(digit), size=int(mask.sum()))
    return chosen


def draw_system_prompt(rng: np.random.Generator, words: int | None = None) -> str:
    """Draw a system prompt of ``words`` words (default: 0 to 60): sentences, then random words."""
    length = int(rng.integers(MAX_SYSTEM_WORDS + 1)) if words is None else words
    prompt: list[str] = []
    if rng.random() < 0.5:
        for sentence in rng.permutation(np.array(SYSTEM_SENTENCES, dtype=object)):
            words_of = str(sentence).split()
            if len(prompt) + len(words_of) <= length and rng.random() < 0.7:
                prompt.extend(words_of)
    prompt.extend(str(word) for word in rng.choice(FILLER_WORDS, size=length - len(prompt)))
    return " ".join(prompt)


@dataclass(frozen=True)
class Asked:
    """A drawn question: its text, its answer, and the cells that hold the answer, as (picture, row, column).

    ``rest`` is how much attention, in cells, a guided head should leave on the first token of the sequence:
    some when counting, so that its share tells the count, and all of it when no cell holds the answer.
    """

    text: str
    answer: str
    cells: tuple[tuple[int, int, int], ...]
    rest: float = 0.0


def draw_question(rng: np.random.Generator, family: str, grids: Sequence[IntArray]) -> Asked:
    """Draw a question of ``family`` about ``grids`` (each ``[rows, columns]``).

    The text counts rows and columns from 1. For ``"where"`` one question in eight asks for an absent digit.
    """
    row = int(rng.integers(min(len(grid) for grid in grids)))
    column = int(rng.integers(COLUMNS))
    line = grids[0][row].tolist()
    digit = line[column]
    if family == "cell":
        return Asked(f"what digit is at row {row + 1} column {column + 1} ?", str(digit), ((0, row, column),))
    if family == "same":
        text = f"are the digits at row {row + 1} column {column + 1} equal in both images ?"
        answer = "yes" if digit == int(grids[1][row, column]) else "no"
        return Asked(text, answer, ((0, row, column), (1, row, column)))
    if family == "count":
        if rng.random() < 0.2:
            digit = int(rng.integers(10))
        cells = tuple((0, row, index) for index, other in enumerate(line) if other == digit)
        return Asked(
            f"how many times is digit {digit} in row {row + 1} ?", str(len(cells)), cells, COUNT_REST
        )
    if family == "where":
        absent = sorted(set(range(10)) - set(line))
        if absent and rng.random() < 0.125:
            digit = absent[int(rng.integers(len(absent)))]
        first = line.index(digit) if digit in line else None
        text = f"which column of row {row + 1} first holds digit {digit} ?"
        return (
            Asked(text, "none", (), 1.0) if first is None else Asked(text, str(first + 1), ((0, row, first),))
        )
    raise ValueError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")


def make_questions(
    split: str = "test",
    family: str = "cell",
    count: int = 100,
    seed: int = 0,
    question_first: bool = False,
    system_words: int | None = None,
) -> list[Question]:
    """Make ``count`` questions of one family; equal arguments give equal questions.

    Every question has its own pictures (10 to 12 rows of 10 digits: 100 to 120 vision tokens each) and its
    own system prompt of ``system_words`` words (default: 0 to 60, drawn).
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")
    scans = load_scans(split)
    key = [seed, FAMILIES.index(family), int(question_first), 0 if split == "train" else 1]
    rng = np.random.default_rng(key)
    questions = []
    for _ in range(count):
        digits = [draw_digits(rng, 1, int(rng.integers(MIN_ROWS, MAX_ROWS + 1)))]
        if image_count(family) == 2:
            digits.append(draw_partner(rng, digits[0], int(rng.integers(MIN_ROWS, MAX_ROWS + 1))))
        chosen = [draw_scans(rng, scans, grid)[0] for grid in digits]
        asked = draw_question(rng, family, [grid[0] for grid in digits])
        questions.append(
            Question(
                family=family,
                question_first=question_first,
                system_prompt=draw_system_prompt(rng, system_words),
                text=asked.text,
                images=tuple(grid_image(scans.ink[rows]) for rows in chosen),
                answer=asked.answer,
                digits=tuple(grid[0] for grid in digits),
                scan_ids=tuple(scans.ids[rows] for rows in chosen),
            )
        )
    return questions


def ask_again(
    question: Question,
    rng: np.random.Generator,
    *,
    question_first: bool,
    system_words: int | None = None,
) -> Question:
    """Draw another question of the same family about the same pictures, after another system prompt.

    Args:
        question: source of the pictures.
        rng: random generator.
        question_first: put the new question before its pictures.
        system_words: words of the new system prompt (default: 0 to 60, drawn).
    """
    drawn = draw_question(rng, question.family, question.digits)
    return dataclasses.replace(
        question,
        system_prompt=draw_system_prompt(rng, system_words),
        text=drawn.text,
        answer=drawn.answer,
        question_first=question_first,
    )


def answer_text(answer: str) -> str:
    """Return the answer in the model's format: one token."""
    return answer


def build_prompt(question: Question) -> str:
    """Build the chat text of ``question`` before its answer; one ``<|image_pad|>`` per picture."""
    return prompt_text(question.system_prompt, question.text, len(question.images), question.question_first)


def prompt_text(system_prompt: str, text: str, images: int, question_first: bool) -> str:
    """Lay out system prompt, pictures and question as chat turns (the processor's chat template, by hand)."""
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * images
    content = text + pictures if question_first else pictures + text
    return (
        f"<|im_start|>system\n{system_prompt}<|im_end|>\n"
        f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )
