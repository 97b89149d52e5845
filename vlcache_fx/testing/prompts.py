"""Tokens and prompts of the tiny models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

VOCABULARY = 200
TEXT_TOKENS = 180
"""Text is drawn from tokens below this id; ids above are special."""
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, BOS, EOS, PAD = 190, 191, 192, 193, 194, 195, 196


def make_prompt(
    before: int, after: int, between: int, media_spans: Sequence[Sequence[int]], text_seed: int
) -> dict[str, Tensor]:
    """Create text around and between ``media_spans``: input_ids and attention_mask, both ``[1, tokens]``."""
    generator = torch.Generator().manual_seed(text_seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, TEXT_TOKENS, (count,), generator=generator).tolist()

    tokens = text(before)
    for index, media_span in enumerate(media_spans):
        tokens += [*(text(between) if index else []), *media_span]
    ids = torch.tensor([[*tokens, *text(after)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(seed: int, *size: int) -> Tensor:
    """Return normal noise, deterministic by seed."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Set torch's seed; restore the generator's state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
