"""The ``torch.compile`` backend: discovery, options, refusals and failures."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from vlcache_fx.backend import engine_for
from vlcache_fx.errors import OptionError, PassError, Reason, UnsupportedGraphError
from vlcache_fx.passes.rewrite import SpliceRows
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import repeat_heads, rotary_angles, rotate
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import (
    Pair,
    distance,
    hits,
    own_compiler_state,
    unique_salt,
    vlcache_store,
    with_api,
    with_backend,
)

FIRST = tiny_vlm_inputs(3, 5, [(20, 0)], text_seed=1)
SECOND = tiny_vlm_inputs(13, 4, [(20, 0)], text_seed=2)

# Inductor imports parts of torch that use torch.jit.
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Masked(TinyVlm):
    """A ``TinyVlm`` with an attention mask of some kind."""

    kind = "causal"

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds, image = self.embed(input_ids), input_ids == IMAGE_TOKEN
        x = embeds.masked_scatter(image[..., None].expand_as(embeds), self.encoder(pixel_values))
        place = torch.arange(x.shape[1])
        mask = self.mask(place, image[0])
        rotary = rotary_angles(place, 8)
        for layer in self.decoder.layers:
            query, key, value = layer.attention.project(layer.norm_1(x))
            query, key = rotate(query, *rotary), repeat_heads(rotate(key, *rotary), 2)
            y = F.scaled_dot_product_attention(query, key, repeat_heads(value, 2), attn_mask=mask)
            x = x + layer.attention.out(y.transpose(1, 2).reshape(1, x.shape[1], -1))
            x = x + layer.mlp(layer.norm_2(x))
        return self.decoder.head(self.decoder.norm(x))

    def mask(self, place: Tensor, image: Tensor) -> Tensor | None:
        causal = place[None, :] <= place[:, None]
        if self.kind == "bias":
            distances = (place[None, :] - place[:, None]) * 0.1
            return torch.where(causal, distances, float("-inf"))[None, None]
        if self.kind == "image both ways":
            return (causal | (image[:, None] & image[None, :]))[None, None]
        if self.kind == "vmap":  # as in transformers
            seen = torch.vmap(torch.vmap(lambda q, k: (k <= q) | (image[q] & image[k]), (None, 0)), (0, None))
            return seen(place, place)[None, None]
        if self.kind == "image sees all":
            return (causal | image[:, None])[None, None]
        if self.kind == "image sees all, text the next":  # in the first two tokens
            ahead = (place[:, None] == 0) & (place[None, :] == 1)
            return (causal | image[:, None] | ahead)[None, None]
        return None  # all tokens attend to all tokens


def masked(kind: str) -> Masked:
    return tiny_vlm(cls=Masked, kind=kind, last_only=False)


class WithBuffer(TinyVlm):
    """Writes to an input and returns a part of it."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.embed(input_ids)
        mask = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(mask, self.encoder(pixel_values))
        buffer[:, : embeds.shape[1]].copy_(embeds)
        return self.decoder(embeds), buffer[:, :3]


def with_buffer() -> WithBuffer:
    return tiny_vlm(cls=WithBuffer, last_only=False)


# Discovery --------------------------------------------------------------------------------------------------


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"TORCHDYNAMO_VERBOSE": "0"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.works("torch.compile", '`backend="vlcache"` without an import', "found")
def test_backend_found_without_import() -> None:
    code = """
import sys, torch
class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        return torch.relu(self.linear(x)).sum()
model = Tiny()
assert "vlcache_fx" not in sys.modules
compiled = torch.compile(model, backend="vlcache", options={"lowering": "eager"})
x = torch.randn(3, 4)
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
print("vlcache_fx.backend" in sys.modules, "vlcache" in torch._dynamo.list_backends())
"""
    assert run_python(code).split() == ["True", "True"]


def test_import_leaves_torch_unchanged() -> None:
    code = """
import sys
import vlcache_fx
assert "torch" not in sys.modules, "import vlcache_fx imported torch"
import torch
config = torch._dynamo.config.get_config_copy()
patched = {name: getattr(torch, name) for name in dir(torch)}
vlcache_fx.Options, vlcache_fx.UnsupportedGraphError, vlcache_fx.__version__
assert not hasattr(torch.ops.vlcache, "splice_rows"), "importing registered operators"
assert all(getattr(torch, name) is value for name, value in patched.items())
assert torch._dynamo.config.get_config_copy() == config
assert "transformers" not in sys.modules
"""
    run_python(code)


# Options ----------------------------------------------------------------------------------------------------


def test_backend_unknown_option() -> None:
    model = tiny_vlm()
    compiled = torch.compile(model, backend="vlcache", options={"bugdet": 1})
    with (
        pytest.raises(
            BackendCompilerFailed, match=r"did you mean 'budget'\?.*policy, budget.*dynamic"
        ) as failed,
        torch.no_grad(),
    ):
        compiled(**FIRST)
    assert isinstance(failed.value.inner_exception, OptionError)


@pytest.mark.works("torch.compile", "`mode=`", "taken; a wrong value is an error")
def test_backend_mode() -> None:
    model, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="vlcache", mode="max-autotune-no-cudagraphs")
        torch.testing.assert_close(compiled(x), model(x))
        engine = engine_for({"mode": "max-autotune-no-cudagraphs"})
        assert engine.graph_calls == 1
        assert engine.compile_cache.options["config_patches"]["max_autotune"] is True
        compiled = torch.compile(model, backend="vlcache", mode="fastest")
        with pytest.raises(BackendCompilerFailed, match="mode='fastest' is not valid") as failed:
            compiled(x)
    assert isinstance(failed.value.inner_exception, OptionError)


def test_backend_bad_value() -> None:
    compiled = torch.compile(tiny_vlm(), backend="vlcache", options={"budget": 2.0})
    with pytest.raises(BackendCompilerFailed, match=r"budget=2.0 is not valid"), torch.no_grad():
        compiled(**FIRST)


def test_engine_for_equal_options() -> None:
    salt = unique_salt()
    assert engine_for({"salt": salt}) is engine_for({"salt": salt, "budget": 0.02})
    assert engine_for({"salt": salt}) is not engine_for({"salt": salt, "budget": 0.03})


# Refusals ---------------------------------------------------------------------------------------------------


def refused(pair: Pair, reason: Reason, *requests: dict[str, Any]) -> dict[str, Any]:
    """Run requests that must all be refused, and equal the unmodified model."""
    for inputs in requests:
        off, report = pair.run(**{name: value.clone() for name, value in inputs.items()})
        assert off == 0.0
        assert report["mode"] == "bypass"
        assert report["spans"] == ()
        assert f"[{reason.value}]" in report["reason"]
    assert set(pair.engine.stats()["refusals"]) == {reason.value}
    assert pair.engine.stats()["calls"]["bypass"] == len(requests)
    assert pair.engine.stats()["calls"]["warm"] == pair.engine.stats()["calls"]["cold"] == 0
    return report


def test_learned_positions_refused_with_source_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vlcache_fx"):
        pair = with_backend(tiny_vlm(last_only=False, learned_positions=True))
        report = refused(pair, Reason.POSITION_IN_STREAM, FIRST, SECOND)
    assert "node 'add'" in report["reason"]
    assert "tiny_vlm.py" in report["reason"]
    assert "x = embeds + self.positions(position_ids)" in report["reason"]
    messages = [r.getMessage() for r in caplog.records if r.name == "vlcache_fx"]
    assert len(messages) == 1  # once per graph, not per call
    assert "[position_in_stream]" in messages[0]
    refusal = pair.engine.refusals[0]
    assert refusal.node == "add"
    assert refusal.source_line is not None


def test_aliased_mutation_refused_and_written() -> None:
    pair = with_backend(with_buffer())
    for inputs in (FIRST, SECOND):
        mine, theirs = torch.zeros(2, 1, 64, 16)
        with torch.no_grad():
            got, part = pair.model(**inputs, buffer=mine)
            expected, _ = pair.reference(**inputs, buffer=theirs)
        assert distance(got, expected) == 0.0
        assert mine.any()
        assert torch.equal(mine, theirs)
        assert part.data_ptr() == mine.data_ptr()
        assert pair.report["mode"] == "bypass"
        assert "[mutated_inputs]" in pair.report["reason"]
        assert "(at node '" in pair.report["reason"]


def test_no_closed_range_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vlcache_fx"):
        pair = with_backend(masked("image sees all, text the next"))
        report = refused(pair, Reason.MASK_FORM, FIRST, SECOND)
    assert "attend to tokens after the span" in report["reason"]
    assert "scaled_dot_product_attention" in report["reason"]
    assert "[mask_form]" in caplog.text


@pytest.mark.parametrize("kind", ["bias", "image both ways", "vmap"])
def test_bidirectional_within_image_reused(kind: str) -> None:
    pair = with_backend(masked(kind), policy="full")
    assert pair.run(**FIRST)[0] == 0.0
    off, report = pair.run(**SECOND)
    assert report["mode"] == "warm"
    assert off == 0.0


def test_bidirectional_attention_not_split() -> None:
    """The graph counts as an encoder, which is reused exactly, for identical inputs."""
    pair = with_backend(masked("everything"))
    for inputs, encoded in [(FIRST, (0, 1)), (SECOND, (0, 2)), (FIRST, (1, 2))]:
        got, expected = pair.both(**inputs)
        assert distance(got, expected) == 0.0
        encoder = pair.engine.stats()["encoder"]
        assert (encoder["hits"], encoder["misses"]) == encoded


@pytest.mark.works("Training", "calls that record gradients", "run unmodified (`grad_required`)")
def test_gradients_refused_and_correct() -> None:
    pair = with_backend(tiny_vlm(last_only=False))
    for inputs in (FIRST, SECOND):
        got, expected = pair.model(**inputs), pair.reference(**inputs)
        assert torch.equal(got, expected)
        got.sum().backward()
        expected.sum().backward()
        assert pair.report["mode"] == "bypass"
        assert "[grad_required]" in pair.report["reason"]
    ours, theirs = dict(pair.model.named_parameters()), dict(pair.reference.named_parameters())
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in theirs)
    assert theirs["encoder.0.weight"].grad.any()
    assert len(pair.engine.store) == 0


def test_failing_pass_runs_model(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(self: SpliceRows, program: Any) -> bool:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(SpliceRows, "run", fail)
    with caplog.at_level(logging.INFO, logger="vlcache_fx"):
        report = refused(with_backend(tiny_vlm(last_only=False)), Reason.LOWERING_FAILED, FIRST)
    assert "pass 'splice_rows'" in report["reason"]
    assert "deliberate" in caplog.text
    with pytest.raises(BackendCompilerFailed, match="pass 'splice_rows'"), torch.no_grad():
        with_backend(tiny_vlm(), strict=True).model(**FIRST)
    assert issubclass(PassError, Exception)


def test_strict_raises_through_dynamo() -> None:
    """Dynamo wraps the backend's error: its message ends with ours, and the typed error is inside."""
    pair = with_backend(tiny_vlm(learned_positions=True), strict=True)
    with (
        pytest.raises(
            BackendCompilerFailed, match=r"\[position_in_stream\].*node 'add', from .*tiny_vlm.py"
        ) as failed,
        torch.no_grad(),
    ):
        pair.model(**FIRST)
    inner = failed.value.inner_exception
    assert isinstance(inner, UnsupportedGraphError)
    assert inner.reason is Reason.POSITION_IN_STREAM
    assert inner.node == "add"


def test_strict_raises_during_call() -> None:
    pair = with_backend(masked("image sees all, text the next"), strict=True)
    with pytest.raises(UnsupportedGraphError, match="attend to tokens after the span"), torch.no_grad():
        pair.model(**FIRST)


@pytest.mark.parametrize("strict", [False, True])
def test_text_only_is_no_refusal(strict: bool) -> None:
    pair = with_backend(tiny_vlm(last_only=False), strict=strict)
    for before in (9, 14):
        got, expected = pair.both(**tiny_vlm_inputs(before, 3, []))
        assert distance(got, expected) == 0.0
    assert pair.engine.refusals == []
    assert pair.run(**FIRST)[1]["mode"] == "cold"  # and prompts with images still work


def test_short_spans_not_reused() -> None:
    pair = with_backend(tiny_vlm(last_only=False), min_span_tokens=20, policy="none")
    short, long = (19, 0), (20, 1)
    for place in range(3):
        off, report = pair.run(**tiny_vlm_inputs(3 + place, 5, [short], text_seed=place))
        assert report["spans"] == ()
        assert report["mode"] == "bypass"
        assert report["reason"] == "no media span"
        assert off == 0.0
    pair.run(**tiny_vlm_inputs(3, 5, [short, long], text_seed=3))
    _, report = pair.run(**tiny_vlm_inputs(9, 5, [short, long], text_seed=4))
    assert hits(report) == [True]
    assert report["spans"][0]["length"] == 20
    assert report["rows_per_layer"][0] == report["num_tokens"] - 20


def test_other_value_of_folded_number_runs_model() -> None:
    """With ``dynamic=True``, floats of modules are inputs, which capture folds; a change is detected."""

    class Scaled(TinyVlm):
        scale = 0.5

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            embeds = self.embed(input_ids)
            mask = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
            return self.decoder(embeds.masked_scatter(mask, self.encoder(pixel_values)) * self.scale)

    model: Any = tiny_vlm(cls=Scaled, last_only=False)
    pair = with_backend(model, policy="full")
    for scale in (0.5, 0.5, 0.25, 0.5):
        pair.model.scale = pair.reference.scale = scale
        got, expected = pair.both(**FIRST)
        assert distance(got, expected) == 0.0


# Inductor ---------------------------------------------------------------------------------------------------


@inductor
@pytest.mark.slow
@pytest.mark.works("torch.compile", "Inductor, other lengths and budgets", "reused; compiled once")
def test_inductor_equals_model_and_compiles_once() -> None:
    """Depth and other lengths, budgets, policies or images cause no compilation."""
    store = vlcache_store()
    pair = with_backend(tiny_vlm(num_layers=3), lowering="inductor", store=store, policy="full")
    off, report = pair.run(**FIRST)
    assert report["mode"] == "cold"
    assert off <= 1e-5
    off, report = pair.run(**SECOND)
    assert report["mode"] == "warm"
    assert off <= 1e-5
    compiled = pair.engine.stats()["compilations"]
    assert compiled > 0
    off, _ = pair.run(**tiny_vlm_inputs(8, 6, [(27, 1)]))
    assert off <= 1e-5
    for policy, budget, before in [("layer_aware", 0.02, 6), ("layer_aware", 0.3, 21), ("none", 0.0, 4)]:
        with pair.engine.using(policy=policy, budget=budget):
            inputs = tiny_vlm_inputs(before, 7, [(27, 1)], text_seed=before)
            assert pair.run(**inputs)[1]["mode"] == "warm"
            inputs = tiny_vlm_inputs(before, 7, [(20, 0)], text_seed=before)
            assert pair.run(**inputs)[1]["mode"] == "warm"
    assert pair.engine.stats()["compilations"] == compiled

    deeper = with_backend(tiny_vlm(num_layers=5, seed=1), lowering="inductor", store=store, policy="full")
    assert deeper.engine is pair.engine  # equal options
    for inputs, mode in [(FIRST, "cold"), (SECOND, "warm")]:
        off, report = deeper.run(**inputs)
        assert report["mode"] == mode
        assert len(report["rows_per_layer"]) == 6
        assert off <= 1e-5
    assert pair.engine.stats()["compilations"] == compiled


@inductor
@pytest.mark.slow
def test_inductor_failure_runs_model() -> None:
    pair = with_api(masked("image sees all, text the next"), lowering="inductor")
    off, report = pair.run(**FIRST)
    assert report["mode"] == "bypass"
    assert off <= 1e-5
