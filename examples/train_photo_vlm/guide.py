"""Attention guidance of a few heads during the training of the photo VLM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.train_photo_vlm.training import Packed

READING, SEARCHING = (2,), (5, 7)
NAMING, FINDING = (4, 8), (12, 18)
"""Layers with two guided heads, one for naming words, one for the start of the answer."""


class Guide:
    """Guides a few heads to the relevant tokens before they answer.

    The question has two words that name a cell. In early layers the second word attends to the first, then to
    the vision tokens with the answer; the start of the answer attends to both words, then to the vision
    tokens. Guidance fades out during training; training without it takes far longer.
    """

    def __init__(self, decoder: Any) -> None:
        self.rotary = decoder.rotary_emb
        self.hidden: dict[int, Tensor] = {}
        self.modules = {
            layer: decoder.layers[layer].self_attn for layer in READING + SEARCHING + NAMING + FINDING
        }
        for layer, module in self.modules.items():
            module.register_forward_pre_hook(self._remember(layer), with_kwargs=True)

    def _remember(self, layer: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden[layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def losses(self, sequence: Packed) -> tuple[Tensor, Tensor]:
        """Minus the log of the attention on naming words, and on vision tokens; means over questions."""
        rows, named, wanted = sequence.asking[::2], sequence.named[:, ::2], sequence.wanted[::2]
        both = torch.stack([wanted, wanted])
        naming = [self._loss(layer, sequence, rows, named) for layer in NAMING]
        finding = [self._loss(layer, sequence, rows, both) for layer in FINDING]
        words = named[1].int().argmax(-1)
        if bool(sequence.mask[words][wanted].all()):  # The pictures precede the question.
            first = torch.stack([named[0], named[0]])
            naming += [self._loss(layer, sequence, words, first) for layer in READING]
            for layer, chosen in zip(SEARCHING, (sequence.by_row, ~sequence.by_row), strict=True):
                if bool(chosen.any()):
                    finding.append(self._loss(layer, sequence, words[chosen], both[:, chosen]))
        return torch.stack(naming).mean(), torch.stack(finding).mean()

    def _loss(self, layer: int, sequence: Packed, rows: Tensor, wanted: Tensor) -> Tensor:
        module, hidden = self.modules[layer], self.hidden[layer][0]
        size, group = module.head_dim, module.num_key_value_groups
        cos, sin = (part[0] for part in self.rotary(hidden, sequence.positions[None]))
        # The first heads of the first two groups: they share no keys.
        query = module.q_proj(hidden[rows]).unflatten(-1, (-1, size))[:, [0, group]].transpose(0, 1)
        key = module.k_proj(hidden).unflatten(-1, (-1, size))[:, :2].transpose(0, 1)
        query = query * cos[rows] + turn(query) * sin[rows]
        key = key * cos + turn(key) * sin
        scores = (query @ key.transpose(1, 2)).float() * module.scaling
        weights = scores.masked_fill(~sequence.mask[rows], float("-inf")).log_softmax(-1)
        looked: Tensor = weights.masked_fill(~wanted, float("-inf")).logsumexp(-1)
        return -looked.mean()


def turn(vectors: Tensor) -> Tensor:
    """Rotary embedding's other half: ``[..., d]`` with its halves swapped and the first one negated."""
    left, right = vectors.chunk(2, -1)
    return torch.cat([-right, left], -1)
