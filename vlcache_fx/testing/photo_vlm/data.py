"""Questions about boards of small pictures, for evaluation and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlcache_fx.testing.photo_vlm.pictures import IntArray, Photos, board_image, load_pictures
from vlcache_fx.testing.photo_vlm.words import (
    CLASSES,
    COLUMN_NAMES,
    FILLERS,
    MAX_CELLS,
    SENTENCES,
    cell_name,
    prompt_parts,
)

if TYPE_CHECKING:
    from PIL.Image import Image

FAMILIES = ("cell", "where", "same")
MAX_SYSTEM_WORDS = 60
GRID = 6
"""Default rows and columns of a board: 6 x 6 cells are 144 vision tokens."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question with its pictures and its answer.

    ``family`` is one of ``FAMILIES``; ``images`` holds one picture, or two for ``"same"``; ``question_first``
    says whether ``text`` stands before the pictures; ``answer`` is a single word. ``boards`` are, per
    picture, what its cells show ``[rows, columns]``, as indices into ``CLASSES``; ``photo_ids`` likewise
    which pictures of the split were used.
    """

    family: str
    question_first: bool
    system_prompt: str
    text: str
    images: tuple[Image, ...]
    answer: str
    boards: tuple[IntArray, ...]
    photo_ids: tuple[IntArray, ...]


@dataclass(frozen=True)
class Asked:
    """A drawn question: its text and its answer.

    ``cells`` are those that hold the answer, as (picture, row, column), from 0;
    ``named`` are the two words of the text that say where to look: column and row, or column and kind.
    """

    text: str
    answer: str
    cells: tuple[tuple[int, int, int], ...]
    named: tuple[str, str]


def image_count(family: str) -> int:
    """Return the number of pictures of a question of ``family``."""
    return 2 if family == "same" else 1


def draw_boards(rng: np.random.Generator, family: str, rows: int, columns: int) -> list[IntArray]:
    """Draw a question's boards ``[rows, columns]``; a second one repeats half of the first one's cells."""
    first = rng.integers(len(CLASSES), size=(rows, columns))
    if image_count(family) == 1:
        return [first]
    other = (first + rng.integers(1, len(CLASSES), size=first.shape)) % len(CLASSES)
    return [first, np.where(rng.random(first.shape) < 0.5, first, other)]


def draw_photos(rng: np.random.Generator, photos: Photos, board: IntArray) -> IntArray:
    """Pick a random picture of its kind for every cell; return ids in the shape of ``board``."""
    chosen = np.empty(board.shape, np.int64)
    for kind in range(len(CLASSES)):
        mask = board == kind
        chosen[mask] = rng.choice(photos.of_class(kind), size=int(mask.sum()))
    return chosen


def draw_system_prompt(rng: np.random.Generator, words: int | None = None) -> str:
    """Draw a system prompt of ``words`` words (default: 0 to 60): sentences, then random words."""
    length = int(rng.integers(MAX_SYSTEM_WORDS + 1)) if words is None else words
    prompt: list[str] = []
    for sentence in rng.permutation(np.array(SENTENCES, dtype=object)):
        words_of = str(sentence).split()
        if len(prompt) + len(words_of) <= length and rng.random() < 0.7:
            prompt.extend(words_of)
    prompt.extend(str(word) for word in rng.choice(FILLERS, size=length - len(prompt)))
    return " ".join(prompt)


def draw_question(rng: np.random.Generator, family: str, boards: Sequence[IntArray]) -> Asked:
    """Draw a question of ``family`` about ``boards`` (each ``[rows, columns]``)."""
    board = boards[0]
    row, column = int(rng.integers(board.shape[0])), int(rng.integers(board.shape[1]))
    kind = int(board[row, column])
    named = (f" {COLUMN_NAMES[column]}", str(row + 1))
    if family == "cell":
        return Asked(f"What is in {cell_name(row, column)}?", CLASSES[kind], ((0, row, column),), named)
    if family == "where":
        line = board[:, column].tolist()
        once = [one for one in line if line.count(one) == 1]
        kind = once[int(rng.integers(len(once)))] if once else kind
        row = line.index(kind)
        text = f"In which row of column {COLUMN_NAMES[column]} is the first {CLASSES[kind]}?"
        return Asked(text, str(row + 1), ((0, row, column),), (named[0], f" {CLASSES[kind]}"))
    if family == "same":
        text = f"Is {cell_name(row, column)} the same kind in both pictures?"
        answer = "yes" if kind == int(boards[1][row, column]) else "no"
        return Asked(text, answer, ((0, row, column), (1, row, column)), named)
    raise ValueError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")


def make_questions(
    split: str = "test",
    family: str = "cell",
    count: int = 100,
    seed: int = 0,
    question_first: bool = False,
    system_words: int | None = None,
    grid: int = GRID,
) -> list[Question]:
    """Make ``count`` questions of one family; equal arguments give equal questions.

    Args:
        split: split of the shipped pictures, ``"test"`` or ``"train"``.
        family: one of ``FAMILIES``.
        count: number of questions; each has other pictures and another system prompt.
        seed: seed of the questions.
        question_first: put the question before its pictures.
        system_words: words of the system prompts (default: 0 to 60, drawn).
        grid: rows and columns of each picture, 1 to 8; a picture has ``4 * grid ** 2`` vision tokens.

    Raises:
        ValueError: an argument is not valid.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not valid: it must be one of {', '.join(FAMILIES)}")
    if not 1 <= grid <= MAX_CELLS:
        raise ValueError(f"grid={grid} is not valid: it must be 1 to {MAX_CELLS}")
    photos = load_pictures(split)
    key = [seed, FAMILIES.index(family), int(question_first), grid, 0 if split == "train" else 1]
    rng = np.random.default_rng(key)
    questions = []
    for _ in range(count):
        boards = draw_boards(rng, family, grid, grid)
        chosen = [draw_photos(rng, photos, board) for board in boards]
        asked = draw_question(rng, family, boards)
        questions.append(
            Question(
                family=family,
                question_first=question_first,
                system_prompt=draw_system_prompt(rng, system_words),
                text=asked.text,
                images=tuple(board_image(photos.pixels[ids]) for ids in chosen),
                answer=asked.answer,
                boards=tuple(boards),
                photo_ids=tuple(chosen),
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
    drawn = draw_question(rng, question.family, question.boards)
    return dataclasses.replace(
        question,
        system_prompt=draw_system_prompt(rng, system_words),
        text=drawn.text,
        answer=drawn.answer,
        question_first=question_first,
    )


def build_prompt(question: Question) -> str:
    """Build the chat text of ``question`` before its answer; one ``IMAGE`` token per picture."""
    return "".join(
        prompt_parts(question.system_prompt, question.text, len(question.images), question.question_first)
    )
