"""What the tiny models share: their tokens, and prompts of text around images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

VOCABULARY = 200
TEXT_TOKENS = 180
"""Text of a prompt is drawn from the tokens below this; those above are special."""
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, BOS, EOS, PAD = 190, 191, 192, 193, 194, 195, 196


def make_prompt(
    before: int, after: int, between: int, runs: Sequence[Sequence[int]], text_seed: int
) -> dict[str, Tensor]:
    """Text around and between ``runs`` of tokens: input_ids and attention_mask, both ``[1, tokens]``."""
    generator = torch.Generator().manual_seed(text_seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, TEXT_TOKENS, (count,), generator=generator).tolist()

    tokens = text(before)
    for index, run in enumerate(runs):
        tokens += [*(text(between) if index else []), *run]
    ids = torch.tensor([[*tokens, *text(after)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(seed: int, *size: int) -> Tensor:
    """Normal noise, the same for the same seed."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights from ``seed`` without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
