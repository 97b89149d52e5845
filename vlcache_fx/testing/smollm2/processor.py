"""Text and passages -> embeddings in which the passages are marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vlcache_fx
from vlcache_fx.testing.smollm2.passages import PASSAGE

if TYPE_CHECKING:
    from transformers import BatchFeature


class PassageProcessor:
    """Processes texts with passages.

    Args:
        tokenizer: the model's.
        embedding: the model's table.
    """

    def __init__(self, tokenizer: Any, embedding: nn.Module) -> None:
        self.tokenizer, self.embedding = tokenizer, embedding

    def __call__(self, images: Sequence[str], text: Sequence[str], **_: Any) -> BatchFeature:
        """Create ``input_ids``, ``attention_mask`` and ``inputs_embeds``, with marks; padded on the left.

        Args:
            images: the passages, in the order of their placeholders.
            text: prompts, with ``PASSAGE`` for each passage. A passage has equal tokens in all of them.

        Raises:
            ValueError: the prompts name more or fewer passages than there are.
        """
        from transformers import BatchFeature

        named = sum(prompt.count(PASSAGE) for prompt in text)
        if named != len(images):
            raise ValueError(f"the text names {named} passages but {len(images)} were given")
        passages = iter(images)
        rows, spans = [], []
        for sample, prompt in enumerate(text):
            first, *others = prompt.split(PASSAGE)
            ids = self._ids(first)
            for part in others:
                passage = self._ids(next(passages))
                spans.append((sample, len(ids), len(passage)))
                ids = [*ids, *passage, *self._ids(part)]
            rows.append(ids)
        length = max(map(len, rows))
        padding = [length - len(ids) for ids in rows]
        pad = int(self.tokenizer.pad_token_id)
        tokens = torch.tensor([[pad] * more + ids for more, ids in zip(padding, rows, strict=True)])
        mask = torch.tensor([[0] * more + [1] * (length - more) for more in padding])
        with torch.no_grad():
            embeds: Tensor = self.embedding(tokens)
        vlcache_fx.mark_spans(embeds, [(sample, padding[sample] + at, size) for sample, at, size in spans])
        return BatchFeature({"input_ids": tokens, "attention_mask": mask, "inputs_embeds": embeds})

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
