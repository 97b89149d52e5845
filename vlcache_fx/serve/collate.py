"""Inputs of several requests -> inputs of one call, padded on the left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS = "input_ids"
MASK = "attention_mask"


def signature(inputs: Mapping[str, Any]) -> Hashable | None:
    """What must be equal for inputs to run in one call; None for inputs that run alone.

    Args:
        inputs: what a processor makes of one prompt. Tensors ``[1, tokens, ...]`` follow the tokens; others
            have one entry per picture, patch or tile in their first dimension.
    """
    entries = []
    for name, value in sorted(inputs.items()):
        if not isinstance(value, Tensor) or value.dim() == 0:
            return None
        follows = _follows_tokens(value, inputs)
        rest = tuple(value.shape[2 if follows else 1 :])
        entries.append((name, follows, value.dtype, rest))
    return tuple(entries)


def collate(prompts: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Put prompts of one signature into a batch.

    Args:
        prompts: the inputs of each, as for ``signature``.
        pad_token_id: the token on the left of shorter prompts.

    Returns:
        The inputs of the batch, with an attention mask.
    """
    if len(prompts) == 1:
        return dict(prompts[0])
    masked = [_with_mask(prompt) for prompt in prompts]
    lengths = {prompt[TOKENS].shape[1] for prompt in masked}
    # Prompts of one length get padding too: models leave out a mask that hides nothing, and would compile
    # programs for such batches of their own.
    longest = max(lengths) + (len(lengths) == 1)
    batch = {}
    for name, first in masked[0].items():
        values = [prompt[name] for prompt in masked]
        if _follows_tokens(first, masked[0]):
            fill = pad_token_id if name == TOKENS else 0
            values = [_pad_left(value, longest, fill) for value in values]
        batch[name] = torch.cat(values)
    return batch


def _follows_tokens(value: Tensor, inputs: Mapping[str, Any]) -> bool:
    return value.dim() >= 2 and value.shape[:2] == inputs[TOKENS].shape


def _with_mask(prompt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {MASK: torch.ones_like(prompt[TOKENS]), **prompt}


def _pad_left(value: Tensor, length: int, fill: int) -> Tensor:
    # F.pad names the last dimension first, and the tokens are the second one.
    before = [0, 0] * (value.dim() - 2) + [length - value.shape[1], 0]
    return F.pad(value, before, value=fill)
