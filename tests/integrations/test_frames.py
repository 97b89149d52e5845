"""Videos frame by frame, for encoders with independent frames."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.integrations.encoder_cache import EncoderCache
from vlcache_fx.integrations.frames import FrameCache, frame_grids, group_frames
from vlcache_fx.options import Options
from vlcache_fx.testing.prompts import noise

PER_FRAME = 4
"""Patches per frame: a grid of 2x2."""


CALLS: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()
"""Calls of each encoder. Not an attribute, because attributes are part of the keys."""


class Encoder(nn.Module):
    """Features per video; ``alone``: frames do not attend to each other."""

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone
        self.weight = nn.Parameter(noise(9, 6, 3))
        self.eval()

    @property
    def calls(self) -> list[int]:
        return CALLS.setdefault(self, [])

    def forward(self, pixel_values_videos: Tensor, video_grid_thw: Tensor, **options: Any) -> Any:
        self.calls.append(pixel_values_videos.shape[0] // PER_FRAME)
        videos = pixel_values_videos.split(video_grid_thw.prod(-1).tolist())
        features: Any = tuple((part if self.alone else part - part.mean(0)) @ self.weight for part in videos)
        if options.get("plain"):
            return features
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values_videos, pooler_output=features)


def cached(encoder: Encoder) -> FrameCache:
    engine = Engine(Options(lowering="eager"))
    return FrameCache(EncoderCache(encoder.forward, encoder, "video", engine))


def video(*frames: int) -> Tensor:
    """A frame per seed."""
    return torch.cat([noise(seed, PER_FRAME, 6) for seed in frames])


def call(*videos: Tensor) -> dict[str, Tensor]:
    grids = [[len(one) // PER_FRAME, 2, 2] for one in videos]
    return {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(grids)}


def check(cache: FrameCache, encoder: Encoder, *videos: Tensor) -> list[int]:
    """Check the features against the encoder; return the number of frames of each of its calls."""
    encoder.calls.clear()
    with torch.no_grad():
        got = cache(**call(*videos))
        calls = list(encoder.calls)
        want = encoder(**call(*videos))
    assert len(got.pooler_output) == len(videos)
    for ours, theirs in zip(got.pooler_output, want.pooler_output, strict=True):
        torch.testing.assert_close(ours, theirs)
    return calls


def test_frame_cache_encodes_only_new_frames() -> None:
    encoder = Encoder()
    cache = cached(encoder)
    # The first video is encoded both ways; then each frame is cached.
    assert check(cache, encoder, video(0, 1, 2)) == [3, 3, 3]
    assert check(cache, encoder, video(1, 2, 3)) == [1]
    assert check(cache, encoder, video(3, 2)) == []
    assert check(cache, encoder, video(2, 4), video(5, 0, 1)) == [2]
    assert check(cache, encoder, video(4)) == []  # a video of one frame
    assert check(cache, encoder, video(6)) == [1]


def test_frame_cache_of_frames_that_attend_to_each_other() -> None:
    encoder = Encoder(alone=False)
    cache = cached(encoder)
    assert check(cache, encoder, video(0, 1, 2)) == [3, 3, 3]
    assert check(cache, encoder, video(0, 1, 2)) == []
    assert check(cache, encoder, video(1, 2, 3)) == [3]
    assert check(cache, encoder, video(1, 2, 3), video(0, 1)) == [2]


def test_frame_cache_returns_other_outputs_unchanged() -> None:
    encoder = Encoder()
    cache = cached(encoder)
    with torch.no_grad():
        for _ in range(2):
            got = cache(**call(video(0, 1)), plain=True)
            assert isinstance(got, tuple)
            assert torch.equal(got[0], video(0, 1) @ encoder.weight)


def test_frame_cache_skips_gradients() -> None:
    encoder = Encoder()
    cache = cached(encoder)
    for _ in range(2):
        cache(**call(video(0, 1))).pooler_output[0].sum().backward()
    assert encoder.calls == [2, 2]


def test_frame_grids() -> None:
    grids = torch.tensor([[2, 4, 6], [1, 2, 2], [3, 2, 8]])
    assert frame_grids(grids).tolist() == [[1, 4, 6]] * 2 + [[1, 2, 2]] + [[1, 2, 8]] * 3


@pytest.mark.parametrize("layers", [False, True])
def test_group_frames_per_video(layers: bool) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    frames = tuple(noise(seed, seed + 1, 4) for seed in range(5))
    output = BaseModelOutputWithDeepstackFeatures(
        pooler_output=frames, deepstack_features=[frames, frames[::-1]] if layers else None
    )
    got = group_frames(output, [2, 1, 2])

    def equal(joined: Any, parts: tuple[Tensor, ...]) -> None:
        want = (torch.cat(parts[:2]), parts[2], torch.cat(parts[3:]))
        for a, b in zip(joined, want, strict=True):
            assert torch.equal(a, b)

    equal(got.pooler_output, frames)
    assert got.last_hidden_state is None
    if layers:
        equal(got.deepstack_features[0], frames)
        equal(got.deepstack_features[1], frames[::-1])
    else:
        assert got.deepstack_features is None
