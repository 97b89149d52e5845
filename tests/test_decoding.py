"""Decoding steps: layers share a compilation and use the kernels for few rows; nothing is reused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering import InductorLowering, Lowered
from vlcache_fx.ops import attention, linear
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl

from .analysis.decoder.test_decode_step import Decoder
from .analysis.decoder.test_decode_step import inputs as step_inputs
from .ops.helpers import kernel_calls, needs_kernel
from .runtime.helpers import Pair, own_compiler_state, with_api, with_backend
from .runtime.test_batches import llava_batch

pytest.importorskip("transformers")

LAYERS, TOKENS = 2, 4


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Scaled(Decoder):
    """Its factor is folded, so calls with another factor run the original graph."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.5

    def forward(self, embeds: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return super().forward(embeds * self.factor, past)


class Sharing(nn.Module):
    """Two layers that attend to one static cache, to which the first layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.query = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, embeds: Tensor, keys: Tensor, values: Tensor, count: Tensor) -> Tensor:
        query, key, value = self.qkv(embeds).unsqueeze(1).chunk(3, -1)
        places = torch.arange(1) + count
        count.add_(1)
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        mask = (torch.arange(keys.shape[2]) <= places)[None, None, None]
        hidden = embeds + F.scaled_dot_product_attention(query, keys, values, mask)[:, 0]
        query = self.query(hidden).unsqueeze(1)
        return hidden + F.scaled_dot_product_attention(query, keys, values, mask)[:, 0]


def compiled(**options: Any) -> Pair:
    return with_api(tiny_qwen2_5_vl(LAYERS), **({"lowering": "inductor", "min_span_tokens": 4} | options))


def generated(model: Any, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the ids, and the logits of all steps, [steps, vocabulary]."""
    inputs = qwen_inputs(9 + seed, 7, [(8, 8, seed)], seed, 3)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False} | options
    with torch.no_grad():
        output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.cat(output.logits)


def check(pair: Pair, seed: int = 0, **options: Any) -> None:
    ids, got = generated(pair.model, seed, **options)
    wanted_ids, want = generated(pair.reference, seed, **options)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def compilations(pair: Pair) -> list[str]:
    """Return the compiled segments of decoding steps, in order."""
    names = [name for name, _ in pair.engine.compile_cache.stats.compilations]
    return [name.partition("/")[2] for name in names if name.startswith("decoding step")]


def test_step_layers_share_compilation() -> None:
    pair = compiled()
    check(pair)
    found = compilations(pair)
    assert sorted(found) == ["layer.0", "prelude", "tail"]  # the first step after a prompt is like the others
    check(pair, seed=1)  # another length
    assert compilations(pair) == found


@pytest.mark.thorough
def test_step_lengths_static_first() -> None:
    pair = compiled(dynamic=None)
    for seed in range(2):
        check(pair, seed)
    assert compilations(pair)


@pytest.mark.thorough
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["sliding_llava", "hybrid_llava"])
def test_step_with_sliding_window(name: str, cache: str) -> None:
    from . import caches  # needs transformers

    pair = with_api(getattr(caches, name)(), lowering="inductor", min_span_tokens=4)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    options["cache_implementation"] = cache
    inputs = llava_inputs(5, 4, [0])
    with torch.no_grad():
        got, want = (model.generate(**inputs, **options) for model in (pair.model, pair.reference))
    assert torch.equal(got, want)
    assert "layer.0" in compilations(pair)


def test_step_eager_compiles_nothing() -> None:
    pair = compiled(lowering="eager")
    check(pair)
    assert compilations(pair) == []


def test_step_writes_static_cache_in_place() -> None:
    pair = compiled(strict=True)
    check(pair, cache_implementation="static")
    found = compilations(pair)
    assert sorted(found) == ["layer.0", "prelude", "tail"]
    check(pair, seed=1, cache_implementation="static")  # another length
    assert compilations(pair) == found


@pytest.mark.thorough
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_step_of_padded_batch(beams: int, cache: str) -> None:
    pair = with_api(tiny_llava(LAYERS), lowering="inductor", min_span_tokens=4, policy="full")
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "num_beams": beams}
    options["cache_implementation"] = cache
    for lengths in ((5, 9), (7, 3)):
        inputs = llava_batch(*(llava_inputs(length, 4, [image]) for image, length in enumerate(lengths)))
        with torch.no_grad():
            got, want = (model.generate(**inputs, **options) for model in (pair.model, pair.reference))
        assert torch.equal(got, want)
    assert "layer.0" in compilations(pair)


def test_step_with_shared_static_cache() -> None:
    model = Sharing()
    pair = with_backend(model, lowering="inductor", strict=True)
    keys, values = torch.randn(2, 1, 1, 9, 16, generator=torch.Generator().manual_seed(0))
    given = {"keys": keys.clone(), "values": values.clone(), "count": torch.tensor(5)}
    theirs = {name: value.clone() for name, value in given.items()}
    for step in range(3):
        embeds = torch.full((1, 1, 16), 0.5 * step)
        with torch.no_grad():
            got, want = pair.model(embeds=embeds, **given), pair.reference(embeds=embeds, **theirs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(given, theirs)
    assert "layer.1" in compilations(pair)


def test_step_lowering_failure_compiles_whole_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def failing(_: InductorLowering, __: Any, *, name: str) -> Lowered:
        failed.append(name)
        raise LoweringError("no")

    monkeypatch.setattr(InductorLowering, "lower", failing)
    model, given = Decoder(), step_inputs()
    with torch.no_grad():
        want = model(**given)[0]
        pair = with_backend(model, lowering="inductor", strict=True)
        torch.testing.assert_close(pair.model(**given)[0], want)
    assert failed == ["decoding step"]
    assert pair.engine.refusals == []


# Compiled programs call the kernels in ops/test_linear.py and passes/rewrite/test_use_row_positions.py.
@needs_kernel
@pytest.mark.thorough
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_step_uses_few_row_kernels(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied, attended = (kernel_calls(module, monkeypatch) for module in (linear, attention))
    pair = with_api(tiny_qwen2_5_vl(LAYERS).bfloat16(), lowering="inductor", min_span_tokens=4)
    generated(pair.model, cache_implementation=cache)
    steps = TOKENS - 1
    assert [sizes[3] for *_, sizes, _, _, _, _ in attended].count(1) == steps * LAYERS
    assert [count for *_, count, _, _ in multiplied].count(1) >= steps * 7 * LAYERS


def test_step_frees_first_keys() -> None:
    model, given = Scaled(), step_inputs()
    with torch.no_grad():
        want = model(**given)[0]
    pair = with_backend(model, lowering="inductor")
    held = [weakref.ref(past) for past in given["past"]]
    with torch.no_grad():
        got = pair.model(**given)[0]
    torch.testing.assert_close(got, want)
    del given
    gc.collect()  # compiled graphs are kept, with the original graph for other factors
    assert compilations(pair) == ["prelude", "layer.0", "tail"]
    assert [one() for one in held] == [None] * len(held)
