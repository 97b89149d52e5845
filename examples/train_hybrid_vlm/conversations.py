"""Training rows: conversations about pictures, question after question, each in causal order.

A recurrent layer sees all that stands before, so the questions of a row cannot be hidden from each other, as
those of the reference model are. All padding stands at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.train_reference_vlm.packing import IGNORE, encode_row, rope_positions
from examples.train_reference_vlm.training import Recipe
from vlcache_fx.testing.reference_vlm.data import (
    FAMILIES,
    MAX_SYSTEM_WORDS,
    Asked,
    draw_digits,
    draw_partner,
    draw_question,
    draw_scans,
    draw_system_prompt,
    image_count,
)
from vlcache_fx.testing.reference_vlm.images import COLUMNS, MAX_ROWS, MIN_ROWS
from vlcache_fx.testing.reference_vlm.scans import Scans
from vlcache_fx.testing.reference_vlm.vocabulary import IMAGE, PAD, TURN_START

Arrays = dict[str, np.ndarray[Any, Any]]
CELLS = COLUMNS + 1
"""Most cells of an answer: a row of a picture, and the first token."""
NO_KIND = 2 * len(FAMILIES)
KINDS = tuple(f"{family} {place}" for place in ("after", "before") for family in FAMILIES)
SMALL, LARGE = ((2, 5), 20), ((MIN_ROWS, MAX_ROWS), MAX_SYSTEM_WORDS)


@dataclass(frozen=True)
class RowRecipe(Recipe):
    """One kind of batch, in rows of ``length`` tokens; ``conversations`` is not used."""

    length: int = 256

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and most questions of a row."""
        return self.length, self.questions


def recipes(share: float) -> tuple[RowRecipe, ...]:
    """The kinds of batches at ``share`` (0..1) of the training, in the order in which they take turns."""
    (rows, words), small = (SMALL, True) if share < 0.3 else (LARGE, False)
    if 0.3 <= share < 0.45:
        rows = (3, MAX_ROWS)
    sizes: Any = {"conversations": 0, "rows": rows, "system_words": words}
    after: Any = {"question_first": False, "questions": 8 if small else 5, "length": 192 if small else 256}
    before: Any = {"question_first": True, "questions": 1, "length": 96 if small else 224}
    two: Any = {"question_first": False, "questions": 8, "length": 192}
    two_before: Any = {"question_first": True, "questions": 1, "length": 160}
    if not small:
        two, two_before = {**two, "questions": 3, "length": 352}, {**two_before, "length": 352}
    count = RowRecipe(families=("count",), **after, **sizes)
    find = RowRecipe(families=("cell", "where"), **after, **sizes)
    mixed = RowRecipe(families=("cell", "count", "count", "where"), **before, **sizes)
    same = RowRecipe(families=("same",), **two, **sizes)
    same_before = RowRecipe(families=("same",), **two_before, **sizes)
    return (find, count, mixed, same, count, find, count, mixed, same_before, count, mixed, same)


def make_batch(
    words: dict[str, int], rng: np.random.Generator, scans: Scans, recipe: RowRecipe, count: int
) -> Arrays:
    """Make ``count`` conversations about pictures of equal sizes.

    Returns:
        ``scans_1 [count, rows, columns]`` and, for two pictures, ``scans_2``: positions in ``scans``.
        ``input_ids``, ``vision_index [count, length]``: vision tokens count from 0 in a row, words are -1.
        ``position_ids [3, count, length]``.
        ``asking [count, questions]``: the token whose successor is the answer; ``labels [count, 2 *
        questions]``: the answer and the end of its turn; ``kind [count, questions]``, of ``KINDS``.
        ``cells``, ``cell_weights [count, questions, CELLS]``: where a guided head should look.
    """
    rows = [
        int(rng.integers(recipe.rows[0], recipe.rows[1] + 1)) for _ in range(image_count(recipe.families[0]))
    ]
    digits = [draw_digits(rng, count, rows[0])]
    if len(rows) == 2:
        digits.append(draw_partner(rng, digits[0], rows[1]))
    batch = _empty(words, recipe, count)
    for number, grid in enumerate(digits):
        batch[f"scans_{number + 1}"] = draw_scans(rng, scans, grid).astype(np.int16)
    for number in range(count):
        grids = [grid[number] for grid in digits]
        families = [
            recipe.families[int(i)] for i in rng.integers(len(recipe.families), size=recipe.questions)
        ]
        asked = [draw_question(rng, family, grids) for family in families]
        system = draw_system_prompt(rng, int(rng.integers(recipe.system_words + 1)))
        kinds = [FAMILIES.index(family) + recipe.question_first * len(FAMILIES) for family in families]
        fill_row(words, batch, number, system, rows, asked, kinds, recipe.question_first)
    return batch


def fill_row(
    words: dict[str, int],
    batch: Arrays,
    number: int,
    system: str,
    rows: Sequence[int],
    asked: Sequence[Asked],
    kinds: Sequence[int],
    first: bool,
) -> None:
    """Write one conversation into row ``number``; questions that do not fit are left out.

    Raises:
        ValueError: not even the first question fits.
    """
    ids, length = batch["input_ids"][number], batch["input_ids"].shape[1]
    row = encode_row(words, system, rows, asked, first)
    end = len(row.prefix)
    turn: list[int] = []
    for slot, (question, answer) in enumerate(zip(row.slots, row.answers, strict=True)):
        tokens = turn + question + answer
        if end + len(tokens) > length:
            if slot == 0:
                raise ValueError(f"a row of {length} tokens has no room for {end + len(tokens)}")
            break
        ids[end : end + len(tokens)] = tokens
        end += len(tokens)
        batch["asking"][number, slot] = end - len(answer) - 1
        batch["labels"][number, 2 * slot : 2 * slot + 2] = answer
        batch["kind"][number, slot] = kinds[slot]
        looked = {cell: weight for cell, weight in row.sources[slot].items() if weight}
        batch["cells"][number, slot, : len(looked)] = list(looked)
        batch["cell_weights"][number, slot, : len(looked)] = list(looked.values())
        turn = [words[TURN_START], words["user"]]
    start = len(row.prefix)
    ids[:start] = row.prefix
    vision = np.flatnonzero(ids == words[IMAGE])
    batch["vision_index"][number, vision] = np.arange(len(vision))
    positions = batch["position_ids"][:, number]
    positions[:, :start] = rope_positions(words, row.prefix, rows)
    positions[:, start:] = positions[:, start - 1].max() + 1 + np.arange(length - start)


def _empty(words: dict[str, int], recipe: RowRecipe, count: int) -> Arrays:
    """The arrays of a batch without any conversation; small types, since they travel between processes."""
    length, questions = recipe.shape
    return {
        "input_ids": np.full((count, length), words[PAD], np.int16),
        "vision_index": np.full((count, length), -1, np.int16),
        "position_ids": np.zeros((3, count, length), np.int16),
        "asking": np.zeros((count, questions), np.int16),
        "labels": np.full((count, 2 * questions), IGNORE, np.int16),
        "kind": np.full((count, questions), NO_KIND, np.int16),
        "cells": np.zeros((count, questions, CELLS), np.int16),
        "cell_weights": np.zeros((count, questions, CELLS), np.float32),
    }
