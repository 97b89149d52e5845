"""Data and losses of a training step of the photo VLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlcache_fx.testing.photo_vlm.adapter import TILE_TOKENS
from vlcache_fx.testing.photo_vlm.data import (
    Asked,
    draw_boards,
    draw_photos,
    draw_question,
    draw_system_prompt,
)
from vlcache_fx.testing.photo_vlm.pictures import IntArray, Photos
from vlcache_fx.testing.photo_vlm.words import (
    CLASSES,
    COLUMN_NAMES,
    IMAGE,
    MAX_CELLS,
    TURN_END,
    answer_text,
    prompt_parts,
)


@dataclass(frozen=True)
class Recipe:
    """One kind of sequence: ``questions`` of ``families`` about boards of ``cells`` (fewest, most) cells.

    ``reused``: each question is asked a second time, about pictures that did not see it (see ``Packed``).
    """

    families: tuple[str, ...]
    question_first: bool
    questions: int
    cells: tuple[int, int]
    system_words: int
    reused: bool = False


@dataclass(frozen=True)
class Packed:
    """Several questions about the same pictures in one sequence; each attends to the prefix and itself.

    ``ids [s]`` and ``positions [s]``; ``mask [s, s]`` is the attention mask; ``photos`` are the ids of the
    photographs of each board, in order; ``asking [n]`` are the rows before the answers ``answers [n]`` and
    turn ends; ``wanted [n, s]`` marks the vision tokens with an answer, and ``named [2, n, s]`` the two words
    of the question that name a cell; ``by_row [n / 2]`` is True for questions whose second word names a row.

    ``reused``: the second half of the questions repeats the first half, but with pictures that attended to
    another question or to none, like donors. Training with it makes pictures and questions independent of
    each other, as Block-Attention (arXiv 2409.15355) does for retrieved passages.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    photos: tuple[IntArray, ...]
    asking: Tensor
    answers: Tensor
    wanted: Tensor
    named: Tensor
    by_row: Tensor
    reused: bool

    def to(self, device: torch.device) -> Packed:
        """Copy the tensors to ``device``."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class SequenceMaker:
    """Draws training sequences, deterministic by seed."""

    def __init__(self, tokenizer: Any, photos: Photos, seed: int) -> None:
        self.tokenizer, self.photos = tokenizer, photos
        self.rng = np.random.default_rng(seed)
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE))
        self.end_id = int(tokenizer.convert_tokens_to_ids(TURN_END))

    def _tokens(self, text: str, tokens_per_picture: int) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [
            one for token in ids for one in [token] * (tokens_per_picture if token == self.image_id else 1)
        ]

    def _shape(self, cells: tuple[int, int]) -> tuple[int, int]:
        while True:
            rows, columns = (int(n) for n in self.rng.integers(1, MAX_CELLS + 1, size=2))
            if cells[0] <= rows * columns <= cells[1]:
                return rows, columns

    def draw(self, recipe: Recipe) -> Packed:
        """Draw one sequence."""
        rng = self.rng
        shape = self._shape(recipe.cells)
        boards = draw_boards(rng, recipe.families[0], *shape)
        photos = tuple(draw_photos(rng, self.photos, board) for board in boards)
        families = [
            recipe.families[int(i)] for i in rng.integers(len(recipe.families), size=recipe.questions)
        ]
        asked = [draw_question(rng, family, boards) for family in families]
        system = draw_system_prompt(rng, int(rng.integers(recipe.system_words + 1)))
        return self.pack(system, asked, photos, recipe.question_first, recipe.reused)

    def pack(
        self,
        system: str,
        asked: Sequence[Asked],
        photos: tuple[IntArray, ...],
        question_first: bool,
        reused: bool = False,
    ) -> Packed:
        """Pack questions about the same pictures after their common prefix.

        Raises:
            ValueError: an answer is not one token, or ``reused`` where the pictures precede the questions.
        """
        if reused and not question_first:
            raise ValueError("reused=True is for questions before their pictures")
        asked = [*asked, *asked] if reused else asked
        tokens = TILE_TOKENS * photos[0].size
        whole = [
            [
                self._tokens(part, tokens)
                for part in prompt_parts(system, one.text, len(photos), question_first)
            ]
            for one in asked
        ]
        # What all questions share: everything up to the pictures, or up to the questions.
        shared = len(whole[0][0])
        if question_first:
            shared = len(self._tokens(prompt_parts(system, "", 0, True)[0], 0))
        ids, positions, spans = list(whole[0][0][:shared]), list(range(shared)), []
        answers, asking = [], []
        for (first, second), one in zip(whole, asked, strict=True):
            answer = self._tokens(answer_text(one.answer), 0)
            if len(answer) != 1:
                raise ValueError(f"{one.answer!r} is {len(answer)} tokens, not one")
            branch = first[shared:] + second + answer
            spans.append((len(ids), len(ids) + len(branch)))
            ids += branch
            positions += range(shared, shared + len(branch))
            asking += [len(ids) - 2, len(ids) - 1]
            answers += [answer[0], self.end_id]
        mask = torch.ones(len(ids), len(ids)).tril().bool()
        for start, end in spans:
            mask[end:, start:end] = False
        pictures = torch.tensor(ids) == self.image_id
        if reused:
            self._hide_questions(mask, pictures, spans)
        wanted = torch.zeros(len(asking), len(ids), dtype=torch.bool)
        named = torch.zeros(2, len(asking), len(ids), dtype=torch.bool)
        columns = photos[0].shape[1]
        for number, ((start, end), one) in enumerate(zip(spans, asked, strict=True)):
            begin, stop = (start, end) if question_first else (0, shared)
            places = begin + pictures[begin:stop].nonzero()[:, 0]
            for picture, row, column in one.cells:
                cell = picture * tokens + TILE_TOKENS * (row * columns + column)
                wanted[2 * number, places[cell : cell + TILE_TOKENS]] = True
            for which, word in enumerate(one.named):
                (token,) = self._tokens(word, 0)
                named[which, 2 * number, ids.index(token, start)] = True
        return Packed(
            torch.tensor(ids),
            torch.tensor(positions),
            mask,
            photos * (len(asked) if question_first else 1),
            torch.tensor(asking),
            torch.tensor(answers),
            wanted,
            named,
            torch.tensor([one.named[1].isdigit() for one in asked]),
            reused,
        )

    def _hide_questions(self, mask: Tensor, pictures: Tensor, spans: Sequence[tuple[int, int]]) -> None:
        """Let the pictures of the second half of ``spans`` see another question of the first, or none."""
        half = len(spans) // 2
        begins = [start + int(pictures[start:end].int().argmax()) for start, end in spans]
        for number, (start, end) in enumerate(spans[half:]):
            rows = start + pictures[start:end].nonzero()[:, 0]
            mask[rows, start : begins[half + number]] = False
            other = (number + 1) % half
            if other != number and self.rng.random() < SEEN_SHARE:
                mask[rows, spans[other][0] : begins[other]] = True


SEEN_SHARE = 0.75
"""Share of repeated questions whose pictures saw another question; those of the others saw none."""


def answer_loss(
    decoder: Any,
    projector: Any,
    features: Tensor,
    sequence: Packed,
    image_id: int,
    reuse_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers and their turn ends, and the share of likeliest answer words.

    A sequence with ``reused`` questions adds ``reuse_weight`` times the divergence (KL, nats) of the answers
    given from reused pictures, from the answers given from pictures that saw the question.

    ``features [photographs, TILE_TOKENS, FEATURES]`` are those of the encoder. Everything is on one device.
    """
    embeds = decoder.get_input_embeddings()(sequence.ids)
    tokens = torch.cat(
        [projector(features[torch.from_numpy(ids)].float()[None])[0] for ids in sequence.photos]
    )
    places = (sequence.ids == image_id)[:, None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, tokens.to(embeds.dtype))
    hidden = decoder.model(
        inputs_embeds=embeds[None],
        attention_mask=sequence.mask[None, None],
        position_ids=sequence.positions[None],
        use_cache=False,
    ).last_hidden_state[0, sequence.asking]
    logits = decoder.lm_head(hidden).float()
    right = (logits[::2].argmax(-1) == sequence.answers[::2]).float().mean()
    weights = torch.tensor([1.0, 0.1], device=logits.device).repeat(len(logits) // 2)
    losses = F.cross_entropy(logits, sequence.answers, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    if sequence.reused:
        exact, reused = logits[::2].log_softmax(-1).chunk(2)
        loss = loss + reuse_weight * F.kl_div(reused, exact, reduction="batchmean", log_target=True)
    return loss, right.detach()


def start_projector(projector: Any, tokenizer: Any, embeddings: Tensor) -> Tensor:
    """Give rows and columns the embeddings of their names; returns the class words' ``[classes, WIDTH]``."""

    def word(text: str) -> Tensor:
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        return embeddings[token].float()

    with torch.no_grad():
        projector.rows.copy_(torch.stack([word(str(row + 1)) for row in range(MAX_CELLS)]))
        projector.columns.copy_(torch.stack([word(f" {name}") for name in COLUMN_NAMES]))
    return torch.stack([word(f" {kind}") for kind in CLASSES])
