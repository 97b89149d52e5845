"""Facts from encoders for the next call of a decoder."""

from __future__ import annotations

import threading

import torch

from vlcache_fx.runtime.call_context import CallContext, PendingContext
from vlcache_fx.runtime.requests.media_spans import MediaItems


def test_with_items_replaces_one_modality() -> None:
    context = CallContext().with_items("image", MediaItems((3, 4))).with_items("video", MediaItems((5,)))
    context = context.with_items("image", MediaItems((6,)))
    assert context.media_items == [MediaItems((6,)), MediaItems((5,))]
    assert context.encoder_hit is None


def test_features_of_an_earlier_run_are_let_go() -> None:
    """Encoders may run again and again before a decoder does."""
    pending = PendingContext()
    for seed in range(3):
        pending.note_features("image", [torch.full((2, 4), seed)])
    pending.note_features("audio", [torch.zeros(1, 4)])
    features = pending.take().media_features
    assert [tuple(item.shape) for item in features] == [(2, 4), (1, 4)]
    assert int(features[0][0, 0]) == 2


def test_take_clears() -> None:
    pending = PendingContext()
    pending.note_items("image", MediaItems((3,)))
    pending.note_encoder(hit=True)
    assert pending.take() == CallContext(encoder_hit=True, items=(("image", MediaItems((3,))),))
    assert pending.take() == CallContext()


def test_take_is_per_thread() -> None:
    pending = PendingContext()
    thread = threading.Thread(target=lambda: pending.note_encoder(hit=False))
    thread.start()
    thread.join()
    assert pending.take() == CallContext()
