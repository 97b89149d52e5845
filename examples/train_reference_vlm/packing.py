"""Training batches: independent questions about one picture, packed into one sequence.

A row is ``prefix, slot, slot, ...``. All slots attend to the prefix (system prompt, pictures and preceding
text). A slot (the rest of a question's turn, and its answer) attends only to itself and the prefix, and its
positions continue those of the prefix: each question has exactly the logits of its own conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlcache_fx.testing.reference_vlm.data import Asked
from vlcache_fx.testing.reference_vlm.images import COLUMNS
from vlcache_fx.testing.reference_vlm.vocabulary import (
    IMAGE,
    PAD,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
)

IGNORE = -100


@dataclass(frozen=True)
class PackedRow:
    """Token ids of one row, before padding: a shared prefix and its slots.

    ``sources``: per slot, prefix token -> attention target of a guided head.
    """

    prefix: list[int]
    slots: list[list[int]]
    answers: list[list[int]]
    sources: list[dict[int, float]]


def encode_row(
    words: dict[str, int], system_prompt: str, rows: Sequence[int], asked: Sequence[Asked], first: bool
) -> PackedRow:
    """Lay out one row: pictures of ``rows`` rows each, and the questions (one when ``first``)."""

    def ids(text: str) -> list[int]:
        return [words[word] for word in text.split()]

    system = ids(f"{TURN_START} system {system_prompt} {TURN_END} {TURN_START} user")
    lead = ids(asked[0].text) if first else []
    pictures: list[int] = []
    starts: list[int] = []
    for height in rows:
        starts.append(len(system) + len(lead) + len(pictures) + 1)
        pictures += [words[VISION_START], *([words[IMAGE]] * (height * COLUMNS)), words[VISION_END]]
    tail = ids(f"{TURN_END} {TURN_START} assistant")
    if first and len(asked) != 1:
        raise ValueError("a question before the pictures has a row of its own")
    return PackedRow(
        prefix=system + lead + pictures,
        slots=[tail if first else ids(one.text) + tail for one in asked],
        answers=[ids(f"{one.answer} {TURN_END}") for one in asked],
        sources=[
            {0: one.rest} | {starts[n] + row * COLUMNS + column: 1.0 for n, row, column in one.cells}
            for one in asked
        ],
    )


def rope_positions(words: dict[str, int], prefix: Sequence[int], rows: Sequence[int]) -> np.ndarray:
    """M-RoPE positions ``[3, length]`` of a prefix, as ``get_rope_index`` counts them."""
    columns: list[np.ndarray] = []
    heights = iter(rows)
    position, index = 0, 0
    while index < len(prefix):
        if prefix[index] != words[IMAGE]:
            columns.append(np.full((3, 1), position))
            position, index = position + 1, index + 1
            continue
        height = next(heights)
        down, across = np.divmod(np.arange(height * COLUMNS), COLUMNS)
        columns.append(np.stack([np.zeros_like(down), down, across]) + position)
        position, index = position + max(height, COLUMNS), index + height * COLUMNS
    return np.concatenate(columns, axis=1)


def pack(words: dict[str, int], packed: Sequence[PackedRow], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Pad rows to one batch.

    ``input_ids [b, s]``; ``labels [b, s]``, already shifted: the token that should follow; ``position_ids
    [3, b, s]``; ``attention_mask [b, 1, s, s]``; ``sources [b, s, prefix]``, how much each
    answering token should look where.
    """
    totals = [
        len(row.prefix) + sum(len(s) + len(a) for s, a in zip(row.slots, row.answers, strict=True))
        for row in packed
    ]
    batch, length = len(packed), -(-max(totals) // 16) * 16
    ids = np.full((batch, length), words[PAD], np.int64)
    labels = np.full((batch, length), IGNORE, np.int64)
    positions = np.zeros((3, batch, length), np.int64)
    segments = np.full((batch, length), -1, np.int64)
    sources = np.zeros((batch, length, max(len(row.prefix) for row in packed)), np.float32)
    for number, row in enumerate(packed):
        end = len(row.prefix)
        ids[number, :end], segments[number, :end] = row.prefix, 0
        positions[:, number, :end] = rope_positions(words, row.prefix, rows)
        start = int(positions[:, number, end - 1].max()) + 1
        for slot, (question, answer) in enumerate(zip(row.slots, row.answers, strict=True)):
            begin, middle, end = end, end + len(question), end + len(question) + len(answer)
            ids[number, begin:end], segments[number, begin:end] = question + answer, slot + 1
            positions[:, number, begin:end] = start + np.arange(end - begin)
            labels[number, middle - 1 : end - 1] = answer
            looked = row.sources[slot]
            sources[number, middle - 1, list(looked)] = list(looked.values())
    segment = torch.from_numpy(segments)
    seen = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    mask = seen & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "attention_mask": mask[:, None],
        "sources": torch.from_numpy(sources),
    }
