"""The system on a GPU."""

import copy
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

pytestmark = pytest.mark.gpu


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_reuse_at_another_offset_on_gpu(lowering: str) -> None:
    unmodified = tiny_qwen2_5_vl().cuda()
    model = vlcache_fx.compile(copy.deepcopy(unmodified), lowering=lowering, policy="full")
    for before, mode in ((5, "cold"), (9, "warm")):
        inputs = on_gpu(qwen_inputs(before, 6, [(8, 12, 0)]))
        with torch.no_grad():
            result, expected = (
                m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, unmodified)
            )
        assert model.vlcache.last_report["mode"] == mode
        assert torch.equal(result, expected)


def test_donors_and_fingerprints_on_gpu() -> None:
    model = vlcache_fx.compile(tiny_qwen2_5_vl().cuda(), lowering="eager")
    with torch.no_grad():
        for _ in range(2):
            model.generate(**on_gpu(qwen_inputs(5, 6, [(8, 12, 0)])), max_new_tokens=1)
        assert model.vlcache.last_report["mode"] == "warm"
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
        model.generate(**on_gpu(qwen_inputs(5, 6, [(8, 12, 0)])), max_new_tokens=1)
    assert model.vlcache.last_report["mode"] == "cold"


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_donors_of_host_tier_on_gpu(lowering: str) -> None:
    unmodified = tiny_qwen2_5_vl().cuda()
    model = vlcache_fx.compile(copy.deepcopy(unmodified), lowering=lowering, policy="full", store="host://")
    for before, images in (
        (5, [(8, 12, 0)]),
        (9, [(8, 12, 0)]),
        (4, [(8, 12, 1)]),
        (3, [(8, 12, 1), (8, 12, 0)]),
    ):
        inputs = on_gpu(qwen_inputs(before, 6, images))
        with torch.no_grad():
            result, expected = (
                m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, unmodified)
            )
        assert torch.equal(result, expected)
    report = model.vlcache.last_report
    assert report["mode"] == "warm"
    assert [span["donor_tier"] for span in report["spans"]] == ["host", "host"]


def test_cuda_graph_equals_model() -> None:
    unmodified = tiny_qwen2_5_vl().cuda()
    model = vlcache_fx.compile(copy.deepcopy(unmodified), policy="full", cuda_graphs=True)
    for seed in range(6):
        inputs = on_gpu(qwen_inputs(5, 6, [(8, 12, 0)], text_seed=seed))
        with torch.no_grad():
            result, expected = (
                m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, unmodified)
            )
        assert model.vlcache.last_report["mode"] == ("warm" if seed else "cold")
        assert torch.equal(result, expected)
