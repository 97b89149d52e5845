"""Batches in time with the training: made by other processes, finished on the training device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.train_hybrid_vlm.conversations import Arrays, RowRecipe, make_batch, recipes
from examples.train_hybrid_vlm.decoder import Batch
from examples.train_hybrid_vlm.pictures import Pictures
from vlcache_fx.testing.reference_vlm.images import COLUMNS, MAX_ROWS
from vlcache_fx.testing.reference_vlm.scans import load_scans
from vlcache_fx.testing.reference_vlm.vocabulary import vocabulary

MOST_VISION_TOKENS = 2 * MAX_ROWS * COLUMNS


@dataclass(frozen=True)
class Clock:
    """How far the training is: ``share`` of ``limit_s`` seconds since ``started`` (``time.time()``)."""

    started: float
    limit_s: float
    begin: float = 0.0

    def share(self) -> float:
        """Return ``begin`` (0..1) at the start, 1 at the end."""
        past = (time.time() - self.started) / self.limit_s
        return min(1.0, self.begin + (1.0 - self.begin) * past)


def conversations_of(recipe: RowRecipe, tokens: int) -> int:
    """How many rows of ``recipe`` a batch of about ``tokens`` tokens has."""
    return max(1, tokens // recipe.length)


class Conversations(IterableDataset[Arrays]):
    """Endless batches; the kinds of batches follow the clock and take turns, whoever makes them."""

    def __init__(self, clock: Clock, tokens: int, seed: int) -> None:
        self.clock, self.tokens, self.seed = clock, tokens, seed

    def __iter__(self) -> Iterator[Arrays]:
        """Make this worker's batches."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rng = np.random.default_rng([self.seed, 3, worker])
        words, scans, number = vocabulary(), load_scans("train"), worker
        while True:
            kinds = recipes(self.clock.share())
            recipe = kinds[number % len(kinds)]
            yield make_batch(words, rng, scans, recipe, conversations_of(recipe, self.tokens))
            number += workers


def load_batches(clock: Clock, tokens: int, seed: int, workers: int) -> DataLoader[Any]:
    """Read ``Conversations`` made by ``workers`` processes, or by this one (0).

    Batches are numpy arrays: those go through pipes; tensors need shared memory, which containers limit.
    """
    return DataLoader(
        Conversations(clock, tokens, seed),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=3 if workers else None,
    )


def _as_is(arrays: Any) -> Any:
    return arrays


def to_device(arrays: Arrays, device: torch.device) -> Batch:
    """Copy a batch to the training device, without waiting for a GPU."""
    batch = {}
    for name, array in arrays.items():
        value: Tensor = torch.from_numpy(array)
        batch[name] = value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value
    return batch


def finish(batch: Batch, pictures: Pictures, guide_weight: float, precision: torch.dtype) -> Batch:
    """Replace scans by ``features [rows, MOST_VISION_TOKENS, hidden]``; add ``guide_weight``."""
    batch = dict(batch)
    scans = [batch.pop(name) for name in ("scans_1", "scans_2") if name in batch]
    features = torch.cat([pictures.features(one, precision) for one in scans], 1)
    batch["features"] = F.pad(features, (0, 0, 0, MOST_VISION_TOKENS - features.shape[1]))
    batch["guide_weight"] = torch.full((), guide_weight, device=features.device)
    return batch
