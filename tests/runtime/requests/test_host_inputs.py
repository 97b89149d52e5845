"""Host inputs are copied to the CPU at once."""

from __future__ import annotations

import warnings

import pytest
import torch

import vlcache_fx
from vlcache_fx.runtime.requests.host_inputs import MAX_BYTES, on_host
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.prompts import noise


def test_on_host_returns_host_tensors() -> None:
    args = [torch.arange(5), 7, noise(0, 3, 2), None]
    brought = on_host(args, [0, 1, 2, 3])
    assert all(one is other for one, other in zip(brought, args, strict=True))


@pytest.mark.gpu
def test_on_host_copies_small_inputs() -> None:
    large = torch.zeros(MAX_BYTES + 1, dtype=torch.uint8, device="cuda")
    args = [torch.arange(5, device="cuda"), noise(0, 3, 2).cuda(), large, torch.eye(3, device="cuda").t()]
    brought = on_host(args, [0, 2, 3])
    assert [one.device.type for one in brought] == ["cpu", "cuda", "cuda", "cpu"]
    assert torch.equal(brought[0], torch.arange(5))
    assert torch.equal(brought[3], torch.eye(3))
    assert brought[1] is args[1]
    assert brought[2] is args[2]


@pytest.mark.gpu
def test_warm_call_synchronizes_three_times() -> None:
    """For weights, for host inputs, and for features."""
    model = vlcache_fx.compile(tiny_qwen2_5_vl().cuda(), lowering="eager", policy="full", dynamic=True)
    calls = [
        {name: value.cuda() for name, value in qwen_inputs(before, 6, [(8, 12, 0)]).items()}
        for before in (5, 9, 9)
    ]
    with torch.no_grad():
        outputs = model.get_image_features(calls[0]["pixel_values"], calls[0]["image_grid_thw"])
        for call in calls:
            ids = call["input_ids"]
            places = torch.arange(ids.shape[1], device="cuda").expand(3, 1, -1)
            given = {"input_ids": ids, "position_ids": places, "mm_encoder_outputs": {"image": outputs}}
            if call is calls[-1]:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                try:
                    model(**given, use_cache=True, logits_to_keep=1)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    assert model.vlcache.last_report["mode"] == "warm"
    assert len([one for one in seen if "synchronizing" in str(one.message)]) <= 3
