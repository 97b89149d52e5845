"""Random small decoders through the backend: cold, fully recomputed elsewhere, and with a few rows.

``passes/test_standard.py`` tests the same properties of programs, for decoders with
``scaled_dot_product_attention``. Here requests run through Dynamo, the mask check, the store and the plan,
with all forms of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.plan.build import build_plan
from vlcache_fx.plan.types import Span
from vlcache_fx.policies.base import Policy, SpanContext
from vlcache_fx.store import Entry
from vlcache_fx.testing.tiny_attention import DecoderShape
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .passes.reference import KeyValue, forward
from .runtime.helpers import Pair, hits, keys, own_compiler_state, with_backend

pytestmark = [
    # The unmodified model runs flex attention uncompiled.
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_compile flag on create_block_mask.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated.*:DeprecationWarning"),
]

HEADS, HIDDEN = 4, 64

# Kind of attention, and True for an explicit mask.
FORMS, FLEX = [("sdpa", False), ("sdpa", True), ("math", False)], [("flex", False)]


CHOICES: dict[str, tuple[Any, ...]] = {
    "num_layers": (2, 3),
    "kv_heads": (1, 2, 4),
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "branch", "post"),
    "rope": ("full", "partial", "interleaved", "complex", "none"),
    "qk_norm": (False, True),
    "fused_qkv": (False, True),
    "bias": (False, True),
    "parallel": (False, True),
    "softcap": (None, 1.5),
    "sinks": (False, True),
    "window": (None, 5, 12),  # shorter than the image, which has at least 16 tokens
    "window_every": (1, 2),
    "embed_scale": (False, True),
    "last_only": (False, True),
}


def decoder_shape(random: Random, forms: Sequence[tuple[Any, bool]] = FORMS) -> DecoderShape:
    chosen = {name: random.choice(values) for name, values in CHOICES.items()}
    attention, explicit_mask = random.choice(forms)
    if attention == "sdpa":
        chosen["softcap"] = None
    if attention != "math":
        chosen["sinks"] = False
    return DecoderShape(
        hidden=HIDDEN, heads=HEADS, attention=attention, explicit_mask=explicit_mask, **chosen
    )


@dataclass(frozen=True)
class Call:
    """A prompt with one image, by the lengths of the text around it."""

    before: int
    after: int
    text: int

    def inputs(self, length: int) -> dict[str, Tensor]:
        return tiny_vlm_inputs(self.before, self.after, [(length, 7)], text_seed=self.text)


@dataclass(frozen=True)
class Given(Policy):
    """A policy that chooses the given offsets."""

    name: ClassVar[str] = "given"
    ignores_budget: ClassVar[bool] = True
    keeps_prefix: ClassVar[bool] = False

    per_layer: tuple[tuple[int, ...], ...] = ()

    def select(self, _: SpanContext) -> Sequence[Tensor]:
        return [torch.tensor(rows, dtype=torch.int64) for rows in self.per_layer]


def request(random: Random, num_layers: int) -> tuple[int, list[Call], Given]:
    """Tokens of the image, three prompts around it, and nested rows to recompute in the last prompt."""
    length = random.randint(16, 24)
    calls = [Call(random.randint(2, 20), random.randint(2, 6), text) for text in (1, 2, 3)]
    rows = sorted(random.sample(range(length), random.randint(0, 6)))
    per_layer = []
    for _ in range(num_layers):
        per_layer.append(tuple(rows))
        rows = [row for row in rows if random.random() < 0.6]
    return length, calls, Given(tuple(per_layer))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def compiled(shape: DecoderShape) -> Pair:
    # Dynamo cannot trace caps and windows of flex attention with symbolic numbers.
    has_number = shape.attention == "flex" and (shape.softcap is not None or shape.window is not None)
    return with_backend(tiny_vlm(shape, seed=1), dynamic=None if has_number else True)


def run(pair: Pair, call: dict[str, Tensor], policy: str | Policy = "full") -> dict[str, Any]:
    """Run a request, whose result must equal that of the unmodified model."""
    with pair.engine.using(policy=policy):
        close(*pair.both(**call))
    return pair.report


def everything(pair: Pair, call: dict[str, Tensor]) -> list[KeyValue]:
    """Return each layer's keys and values from the reference, after comparing it with the model."""
    shape = pair.reference.decoder.shape
    rows = [torch.arange(call["input_ids"].shape[1])] * (shape.num_layers + 1)
    with torch.no_grad():
        logits, states = forward(pair.reference, call, rows)
        close(logits[:, -1:] if shape.last_only else logits, pair.reference(**call))
    return states


def by_token(value: Tensor) -> Tensor:
    """Return stored keys or values of any layout as [tokens, width]."""
    rows = value.transpose(1, 2) if value.dim() == 4 else value
    return rows.reshape(rows.shape[1], -1)


def check_donor(donor: Entry, states: Sequence[KeyValue], span: slice) -> None:
    """Check that a donor has the projections of these tokens in this prompt, before positions enter."""
    slots = {f"{layer}.{letter}" for layer in range(len(states)) for letter in "kv"}
    assert slots <= donor.tensors.keys() <= slots | {"residual"}
    for layer, state in enumerate(states):
        for letter, value in zip("kv", state, strict=True):
            stored = donor.tensors[f"{layer}.{letter}"]
            assert stored.dim() == 3 or stored.shape[1:3] == (value.shape[1], span.stop - span.start)
            close(by_token(stored), by_token(value[:, :, span]))


def check_few_rows(pair: Pair, call: Call, length: int, policy: Given, states: Sequence[KeyValue]) -> None:
    """Compare computed rows with a reference that reads the donor's keys and values.

    Args:
        pair: the models; the store has the donor.
        call: the prompt.
        length: number of tokens of its image.
        policy: the rows of the image to compute.
        states: keys and values of the donor's rows.
    """
    inputs, shape = call.inputs(length), pair.reference.decoder.shape
    num_tokens, start = inputs["input_ids"].shape[1], call.before
    plan = build_plan(
        num_tokens=num_tokens,
        spans=[Span(0, start, length, "key", True)],
        num_layers=shape.num_layers,
        policy=policy,
        budget=1.0,
        output_rows=torch.tensor([num_tokens - 1]) if shape.last_only else None,
    )
    full = []
    for state in states:
        table = torch.full((2, 1, shape.kv_heads, num_tokens, shape.head_dim), float("nan"))
        table[0, :, :, start : start + length], table[1, :, :, start : start + length] = state
        full.append((table[0], table[1]))
    with torch.no_grad():
        partial, _ = forward(pair.reference, inputs, plan.rows, full)
    with pair.engine.using(policy=policy):
        got, exact = pair.both(**inputs)
    assert (pair.report["mode"], pair.report["prefix_tokens"]) == ("warm", 0)
    assert pair.report["rows_per_layer"] == plan.rows_per_layer
    computed = num_tokens - length + len(policy.per_layer[0])
    assert pair.report["rows_per_layer"][0] == computed
    if shape.last_only:
        close(got, partial[:, -1:])  # programs compute at least two rows
    else:
        close(got[:, plan.rows[-1]], partial)
    if shape.window is None and shape.num_layers > 1:  # the window of the last row may not reach the image
        assert not torch.allclose(got, exact, rtol=0, atol=1e-4)  # approximate


def check(shape: DecoderShape, length: int, calls: Sequence[Call], policy: Given) -> None:
    with own_compiler_state():
        pair = compiled(shape)
        donors = []
        for call in calls[:2]:
            inputs = call.inputs(length)
            pair.engine.clear()
            report = run(pair, inputs)
            assert report["mode"] == "cold"
            donors.append(pair.engine.store.get(keys(report)[0]))
            assert donors[-1] is not None
            states = everything(pair, inputs)
            check_donor(donors[-1], states, slice(call.before, call.before + length))
        # Keys of the first layer depend on their token only, not on its position.
        for slot in ("0.k", "0.v"):
            close(*(donor.tensors[slot] for donor in donors))

        # After another prompt, with the second donor.
        report = run(pair, calls[2].inputs(length))
        assert (report["mode"], hits(report), report["token_layer_fraction"]) == ("warm", [True], 1.0)
        start = calls[1].before
        own = [tuple(part[:, :, start : start + length] for part in state) for state in states]
        check_few_rows(pair, calls[2], length, policy, own)
        assert pair.engine.refusals == []
        assert pair.engine.stats()["calls"]["bypass"] == 0


# Seeds, because hypothesis repeats few values per choice, and there are many choices.
RANDOMS = st.randoms(use_true_random=True)


@settings(max_examples=4)
@given(random=RANDOMS)
def test_random_decoders(random: Random) -> None:
    shape = decoder_shape(random)
    check(shape, *request(random, shape.num_layers))


@pytest.mark.thorough  # "flex windows" is below, and test_attention_forms.py has others
@settings(max_examples=1)  # Dynamo is several times slower than for other forms
@given(random=RANDOMS)
def test_random_decoders_with_flex_attention(random: Random) -> None:
    shape = decoder_shape(random, FLEX)
    check(shape, *request(random, shape.num_layers))


BASE = DecoderShape(hidden=HIDDEN, heads=HEADS, kv_heads=2)

CORNERS = {
    "windows between full layers": {"num_layers": 4, "window": 5, "window_every": 2},
    "windows everywhere, all logits": {"window": 3, "explicit_mask": True, "last_only": False},
    "gemma": {
        "attention": "math",
        "softcap": 1.5,
        "window": 7,
        "window_every": 2,
        "embed_scale": True,
        "qk_norm": True,
    },
    "sinks in windows": {"attention": "math", "sinks": True, "window": 4, "kv_heads": 1, "bias": True},
    "flex windows": {"attention": "flex", "window": 6, "window_every": 2, "rope": "partial"},
    "falcon": {"parallel": True, "norm": "layer", "fused_qkv": True, "kv_heads": 1, "bias": True},
    "olmo": {"norm_place": "branch", "qk_norm": True, "kv_heads": 4, "rope": "interleaved"},
    "no positions": {"rope": "none", "norm_place": "post", "fused_qkv": True, "qk_norm": True},
    "complex positions": {"rope": "complex", "explicit_mask": True, "fused_qkv": True},
    "one layer": {"num_layers": 1, "embed_scale": True, "rope": "complex", "kv_heads": 4},
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corner_cases(corner: str) -> None:
    shape = replace(BASE, **CORNERS[corner])
    rows = ((0, 1, 9), (0, 9), (0,), ())[: shape.num_layers]
    check(shape, 20, [Call(3, 5, 1), Call(11, 2, 2), Call(17, 4, 3)], Given(rows))


@settings(max_examples=3)
@given(random=RANDOMS)
def test_learned_positions_refused(random: Random) -> None:
    """With all other parts of decoders."""
    shape = replace(decoder_shape(random), learned_positions=True)
    with own_compiler_state():
        pair = compiled(shape)
        for call in (Call(3, 5, 1), Call(11, 2, 2)):
            report = run(pair, call.inputs(20))
            assert report["mode"] == "bypass"
            assert f"[{Reason.POSITION_IN_STREAM.value}]" in report["reason"]
        assert {refusal.reason for refusal in pair.engine.refusals} == {Reason.POSITION_IN_STREAM}
        assert len(pair.engine.store) == 0
