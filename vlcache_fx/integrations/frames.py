"""Videos frame by frame: where an encoder looks at each frame alone, a frame is an item of its own.

So a sliding window over a stream finds all frames but the new ones, in whatever window they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vlcache_fx.integrations.encoder_cache import EncoderCache
from vlcache_fx.integrations.items import feature_fields
from vlcache_fx.keys.digest_cache import join_rows

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative to the largest value: other shapes of the same products are rounded otherwise."""


class FrameCache:
    """An ``EncoderCache`` that is given the frames of videos one by one, with a grid for each.

    A frame is what the grid counts in time: a frame, or a patch of several. Whether an encoder looks at each
    alone is tried out once, with the first video of several frames: it is encoded both ways.

    Args:
        cache: of the encoder; its grids are ``[videos, 3]``, in time, height and width.
    """

    def __init__(self, cache: EncoderCache) -> None:
        self._cache = cache
        self._are_alone: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the encoder's own method."""
        call = self._cache.arguments(args, kwargs)
        grids = call.get(self._cache.grids_name)
        if grids is None or len(args) > 2 or torch.is_grad_enabled() or not _has_frames(grids):
            return self._cache(*args, **kwargs)
        counts = [int(count) for count in grids[:, 0].tolist()]
        framed = {**call, self._cache.grids_name: frame_grids(grids)}
        if self._are_alone is None:
            self._are_alone = _equal(self._cache.encode(**call), self._cache.encode(**framed), counts)
        return (
            group_frames(self._cache(**framed), counts) if self._are_alone else self._cache(*args, **kwargs)
        )


def _has_frames(grids: Any) -> bool:
    return (
        isinstance(grids, Tensor)
        and grids.dim() == 2
        and grids.shape[1] == 3
        and bool((grids[:, 0] > 1).any())
    )


def frame_grids(grids: Tensor) -> Tensor:
    """The grids of all frames, [frames, 3]: one in time each."""
    repeated = grids.repeat_interleave(grids[:, 0], dim=0)
    return torch.cat([torch.ones_like(repeated[:, :1]), repeated[:, 1:]], dim=1)


def group_frames(output: Any, counts: Sequence[int]) -> Any:
    """An output with features per frame as one with features per video.

    Args:
        output: of the encoder.
        counts: frames of each video.
    """
    fields = dict(output.items())
    changed = {name: _joined(value, counts) for name, value in fields.items()}
    return type(output)(**{name: value for name, value in (fields | changed).items() if value is not None})


def _joined(value: Any, counts: Sequence[int]) -> Any:
    if not isinstance(value, list | tuple):
        return value
    if len(value) == sum(counts) and all(isinstance(part, Tensor) for part in value):
        starts = [sum(counts[:index]) for index in range(len(counts))]
        return tuple(
            join_rows(value[start : start + count]) for start, count in zip(starts, counts, strict=True)
        )
    return [_joined(part, counts) for part in value]


def _equal(whole: Any, framed: Any, counts: Sequence[int]) -> bool:
    """True where the features are the same but for rounding."""
    first, second = feature_fields(whole), feature_fields(framed)
    if first is None or second is None or first.keys() != second.keys():
        return False
    regrouped_fields = {name: _joined(value, counts) for name, value in second.items()}
    pairs = list(zip(_tensors(first), _tensors(regrouped_fields), strict=False))
    return len(_tensors(first)) == len(_tensors(regrouped_fields)) > 0 and all(
        one.shape == other.shape and _close(one, other) for one, other in pairs
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(one.abs().max()) if one.numel() else 0.0
    return bool((one - other).abs().max() <= TOLERANCE.get(one.dtype, 1e-4) * scale) if one.numel() else True
