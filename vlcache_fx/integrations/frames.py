"""Videos frame by frame: if frames do not attend to each other in the encoder, each is cached separately.

A sliding window over a stream then encodes only the new frames.
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
"""Relative to the largest value: matrix products of other shapes round differently."""


class FrameCache:
    """Passes videos to an ``EncoderCache`` frame by frame, with a grid per frame.

    A frame is one step of the grid's time dimension, which may be a temporal patch of several frames. The
    first video with several frames is encoded both ways, to test whether frames are independent.

    Args:
        cache: cache of the encoder; its grids are ``[videos, 3]``: time, height and width.
    """

    def __init__(self, cache: EncoderCache) -> None:
        self._cache = cache
        self._are_independent: bool | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments and return the result of the encoder's own method."""
        call = self._cache.arguments(args, kwargs)
        grids = call.get(self._cache.grids_name)
        if grids is None or len(args) > 2 or torch.is_grad_enabled() or not _has_frames(grids):
            return self._cache(*args, **kwargs)
        counts = [int(count) for count in grids[:, 0].tolist()]
        framed = {**call, self._cache.grids_name: frame_grids(grids)}
        if self._are_independent is None:
            whole, by_frame = self._cache.encode(**call), self._cache.encode(**framed)
            self._are_independent = _are_close(whole, by_frame, counts)
        if not self._are_independent:
            return self._cache(*args, **kwargs)
        return group_frames(self._cache(**framed), counts)


def _has_frames(grids: Any) -> bool:
    return (
        isinstance(grids, Tensor)
        and grids.dim() == 2
        and grids.shape[1] == 3
        and bool((grids[:, 0] > 1).any())
    )


def frame_grids(grids: Tensor) -> Tensor:
    """Return the grids of all frames, [frames, 3], with time 1."""
    repeated = grids.repeat_interleave(grids[:, 0], dim=0)
    return torch.cat([torch.ones_like(repeated[:, :1]), repeated[:, 1:]], dim=1)


def group_frames(output: Any, counts: Sequence[int]) -> Any:
    """Return an encoder output with features per frame as an output with features per video.

    Args:
        output: encoder output.
        counts: number of frames of each video.
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


def _are_close(whole: Any, framed: Any, counts: Sequence[int]) -> bool:
    """Return whether the features are equal up to rounding."""
    first, second = feature_fields(whole), feature_fields(framed)
    if first is None or second is None or first.keys() != second.keys():
        return False
    regrouped_fields = {name: _joined(value, counts) for name, value in second.items()}
    wanted, got = _tensors(first), _tensors(regrouped_fields)
    return len(wanted) == len(got) > 0 and all(map(_close_tensors, wanted, got))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _close_tensors(want: Tensor, got: Tensor) -> bool:
    if want.shape != got.shape or not want.numel():
        return want.shape == got.shape
    return bool((want - got).abs().max() <= TOLERANCE.get(want.dtype, 1e-4) * want.abs().max().item())
