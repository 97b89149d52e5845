"""The system on a GPU."""

import copy
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.runtime.donors.donor_dtype import FLOAT8_CAPABILITY
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

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


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("donor_dtype", ["int8", "float8"])
def test_packed_donors_on_gpu(donor_dtype: str, cuda_graphs: bool) -> None:
    """Answers differ from those of full-size donors by rounding alone."""
    if donor_dtype == "float8" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        pytest.skip("this GPU does not convert float8")
    given: dict[str, Any] = {"policy": "none", "strict": True, "cuda_graphs": cuda_graphs}
    vlm = tiny_vlm(num_layers=4, last_only=False).cuda()
    packed = vlcache_fx.compile(copy.deepcopy(vlm), donor_dtype=donor_dtype, **given)
    full_size = vlcache_fx.compile(vlm, **given)
    images = [(40, 0), (31, 1)]
    with torch.no_grad():
        for seed in range(5):  # the third warm run replays a recording
            inputs = on_gpu(tiny_vlm_inputs(5, 9, images, text_seed=seed))
            result, expected = packed(**inputs), full_size(**inputs)
            for model in (packed, full_size):
                assert model.vlcache.last_report["mode"] == ("warm" if seed else "cold")
            off = (result - expected).abs().max() / expected.std()
            assert (0 < off < 0.2) if seed else off < 1e-4


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_recurrent_layers_on_gpu(lowering: str) -> None:
    unmodified = tiny_hybrid("cdsap", last_only=False).cuda()
    model = vlcache_fx.compile(
        copy.deepcopy(unmodified), policy="full", strict=True, lowering=lowering, budget=0.1
    )
    with torch.no_grad():
        model(**on_gpu(tiny_vlm_inputs(5, 9, [(40, 0), (31, 1)])))
        for before, policy in ((11, "full"), (5, "none")):
            inputs = on_gpu(tiny_vlm_inputs(before, 12, [(40, 0), (31, 1)]))
            with model.vlcache.using(policy=policy):
                result = model(**inputs)
            assert model.vlcache.last_report["mode"] == "warm"
            torch.testing.assert_close(result, unmodified(**inputs), rtol=0, atol=1e-4)
