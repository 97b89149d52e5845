"""Closed-form initialisation of search heads: linear probes of hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from examples.train_photo_vlm.guide import SEARCHING
from examples.train_photo_vlm.training import Recipe, SequenceMaker, answer_loss
from examples.train_photo_vlm.updates import LowRank
from vlcache_fx.testing.photo_vlm.adapter import TILE_TOKENS, UPDATE_SCALE
from vlcache_fx.testing.photo_vlm.words import CLASSES, MAX_CELLS

SLOW = slice(16, 32)
"""Dimensions of a head that rotary embedding rotates slowly; as many as the rank."""

STRENGTH = (11.0, 5.0)
"""Scale of each layer's queries and keys; larger values amplify the probes' errors."""

QUESTIONS, CELLS, SYSTEM_WORDS = 12, (12, 30), 30


def start_search(
    decoder: Any,
    projector: Any,
    features: Tensor,
    maker: SequenceMaker,
    updates: Mapping[str, LowRank],
    sequences: int = 24,
) -> None:
    """Initialise the updates of queries and keys of the ``SEARCHING`` layers with two linear probes each.

    One probe reads the named cell from the second naming word, the other reads position and kind from vision
    tokens. Both write to the same slow dimensions of the guided heads: matching queries and keys have large
    products. The first layer matches column and row, the second column and kind. Training finds this much
    later.
    """
    for layer, strength, family in zip(SEARCHING, STRENGTH, ("cell", "where"), strict=True):
        module = decoder.model.layers[layer].self_attn
        asked, seen = _read(decoder, projector, features, maker, module, family, sequences)
        sizes = (MAX_CELLS, MAX_CELLS if family == "cell" else len(CLASSES))
        for name, (vectors, codes), heads in (
            ("q_proj", asked, [0, module.num_key_value_groups]),
            ("k_proj", seen, [0, 1]),
        ):
            weight = probe(vectors, codes, sizes)
            update = updates[f"layers.{layer}.self_attn.{name}"]
            with torch.no_grad():
                update.down.zero_()
                update.down[: len(weight)] = weight
                update.up.zero_()
                for head in heads:
                    rows = update.up.view(-1, module.head_dim, update.up.shape[1])[head]
                    rows[SLOW] = torch.eye(update.up.shape[1], device=rows.device) * strength / UPDATE_SCALE


Read = tuple[Tensor, Tensor]


def _read(
    decoder: Any,
    projector: Any,
    features: Tensor,
    maker: SequenceMaker,
    module: Any,
    family: str,
    sequences: int,
) -> tuple[Read, Read]:
    """Hidden states ``[n, d]`` with their codes ``[n, 2]``: of second naming words, and of vision tokens."""
    kept: list[Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0].float())

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for _ in range(sequences):
            packed = maker.draw(Recipe((family,), False, QUESTIONS, CELLS, SYSTEM_WORDS)).to(features.device)
            answer_loss(decoder, projector, features, packed, maker.image_id)
            hidden, pictures = kept.pop(), packed.ids == maker.image_id
            codes = (
                _codes(maker, packed.photos[0], family).repeat_interleave(TILE_TOKENS, 0).to(hidden.device)
            )
            words = packed.named[1, ::2].int().argmax(-1)
            places = packed.wanted[::2].int().argmax(-1) - pictures.int().argmax()
            parts.append((hidden[words], codes[places], hidden[pictures], codes))
    hook.remove()
    words, places, tokens, codes = (torch.cat(part) for part in zip(*parts, strict=True))
    return (words, places), (tokens, codes)


def _codes(maker: SequenceMaker, photos: Any, family: str) -> Tensor:
    """Column and row, or column and kind, of every cell: ``[cells, 2]``."""
    kinds = torch.from_numpy(maker.photos.labels[photos])
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in photos.shape), indexing="ij")
    return torch.stack([columns, rows if family == "cell" else kinds], -1).reshape(-1, 2)


def probe(vectors: Tensor, codes: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Ridge regression from ``vectors [n, d]`` to the two ``codes [n, 2]``, each as a corner of a simplex.

    Returns ``[sum of sizes - 2, d]``.
    """
    targets = []
    for column, size in enumerate(sizes):
        corners = torch.linalg.svd(torch.eye(size, device=codes.device) - 1.0 / size).U[:, : size - 1]
        targets.append(corners[codes[:, column]])
    gram = vectors.T @ vectors
    gram += 0.003 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    weight: Tensor = torch.linalg.solve(gram, vectors.T @ torch.cat(targets, 1))
    return weight.T
