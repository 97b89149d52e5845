"""All reasons for refusing a graph, each with a minimal model, through ``vlcache_fx.compile``.

A refusal reaches the user as an error with ``strict``, and else in counts and reports, while the model runs
as it would without this package. Tests of analysis cover the conditions and messages of refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.errors import LoweringError, Reason, UnsupportedGraphError
from vlcache_fx.lowering import EagerLowering
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import Pair, own_compiler_state, with_api

ONE = tiny_vlm_inputs(3, 5, [(20, 0)])
MANY = {name: torch.cat([value, value]) for name, value in ONE.items()}


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


# Parts of decoders: each takes [batch, tokens, hidden] and returns as much ----------------------------------


class Part(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.function(x)


def attend(x: Tensor, **options: Any) -> Tensor:
    heads = x[:, None]
    return F.scaled_dot_product_attention(heads.exp(), heads.sin(), heads.cos(), **options)[:, 0]


def weighted_again(x: Tensor) -> Tensor:
    weights = (x @ x.mT).softmax(-1) * 0.5
    return weights @ x


def samples_among_heads(x: Tensor) -> Tensor:
    samples, tokens, hidden = x.shape
    heads = x.view(samples, tokens, 2, hidden // 2).permute(2, 0, 1, 3).flatten(0, 1)
    y = F.scaled_dot_product_attention(heads.exp(), heads.sin(), heads.cos(), is_causal=True)
    return y.view(2, samples, tokens, hidden // 2).permute(1, 2, 0, 3).flatten(2)


def images_see_all(x: Tensor) -> Tensor:
    """Images attend to all tokens, and so does the first token of text: nothing ends a block."""
    place = torch.arange(x.shape[1])
    ahead = (place[:, None] == 0) & (place[None, :] == 1)
    image = (place[:, None] >= 3) & (place[:, None] < 20)
    return attend(x, attn_mask=(place[None, :] <= place[:, None]) | image | ahead)


class Other(TinyVlm):
    """A model with a function between the merge and the decoder, or instead of the decoder."""

    kind = "plain"

    def forward(self, input_ids: Tensor, pixel_values: Tensor, state: Tensor | None = None) -> Any:
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        if self.kind == "written":
            assert state is not None
            state[:, : x.shape[1]].copy_(x)
            return self.decoder(x), state[:, :3]
        if self.kind == "pruned":
            x = x[input_ids < 150][None]
        if self.kind == "derivative":
            x = x * torch.func.grad(lambda scale: (scale * scale).sum())(x)
        if self.kind == "two streams":
            heads = F.scaled_dot_product_attention(x[:, None].exp(), x[:, None], x[:, None], is_causal=True)
            heads = F.scaled_dot_product_attention(heads.exp(), heads.sin(), heads.cos(), is_causal=True)
            return self.decoder.head(x + heads[:, 0])
        return self.decoder(x)


def other(kind: str) -> Any:
    return tiny_vlm(cls=Other, kind=kind, last_only=False)


def with_part(name: str, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a model with each layer's ``attention`` or ``mlp`` replaced by a function."""
    model = tiny_vlm(last_only=False)
    for layer in model.decoder.layers:
        setattr(layer, name, Part(function))
    return model


class HiddenStates(TinyVlm):
    """Returns the output of its first layer."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        first = self.decoder.layers[0](embeds.masked_scatter(image, self.encoder(pixel_values)), None, None)
        return self.decoder.head(self.decoder.layers[1](first, None, None)), first


def hidden_states() -> Any:
    return tiny_vlm(cls=HiddenStates)


class OneQuery(nn.Module):
    """A decoding step: one token attends to the keys of a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        heads = self.project(x)[:, None]
        keys = torch.cat([past, heads], 2)
        return x + F.scaled_dot_product_attention(heads, keys, keys)[:, 0]


@dataclass(frozen=True)
class Case:
    """A reason, and a model with this reason.

    Attributes:
        model: function that builds the model.
        inputs: inputs of the call.
        raises: True if ``strict`` raises the reason; without ``strict`` it is counted.
        reported: True if calls are reported as bypasses with this reason.
        no_grad: True to run calls without gradients.
    """

    model: Callable[[], Any]
    inputs: dict[str, Tensor]
    raises: bool = True
    reported: bool = True
    no_grad: bool = True


CASES: dict[Reason, Case] = {
    Reason.NO_ATTENTION: Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        {"input": torch.ones(2, 4)},
        raises=False,
        reported=False,
    ),
    Reason.NO_MERGE: Case(tiny_vlm, tiny_vlm_inputs(9, 3, []), raises=False),
    Reason.NO_STREAM: Case(lambda: other("two streams"), ONE),
    Reason.UNKNOWN_OP: Case(lambda: with_part("mlp", lambda x: x.flip(1)), ONE),
    Reason.TOKEN_AXIS_LOST: Case(hidden_states, ONE),
    Reason.TOKEN_MIXING: Case(lambda: with_part("mlp", lambda x: x.cumsum(1)), ONE),
    Reason.POSITION_IN_STREAM: Case(lambda: tiny_vlm(learned_positions=True), ONE),
    Reason.BATCHED: Case(lambda: with_part("attention", samples_among_heads), MANY),
    Reason.MUTATED_INPUTS: Case(lambda: other("written"), ONE | {"state": torch.zeros(1, 64, 16)}),
    Reason.PAST_KEYS: Case(
        OneQuery, {"x": torch.ones(1, 1, 4), "past": torch.ones(1, 1, 7, 4)}, raises=False, reported=False
    ),
    Reason.ATTENTION_FORM: Case(lambda: with_part("attention", weighted_again), ONE),
    Reason.MASK_FORM: Case(lambda: with_part("attention", images_see_all), ONE),
    Reason.CAPTURE_FAILED: Case(lambda: other("derivative"), ONE),
    Reason.GRAD_REQUIRED: Case(tiny_vlm, ONE, no_grad=False),
    Reason.DATA_DEPENDENT: Case(lambda: other("pruned"), ONE),
}
"""All except LOWERING_FAILED, which needs no special model: see below."""


def call(model: Any, case: Case) -> Any:
    # Clones, because a model writes to its inputs.
    with torch.set_grad_enabled(not case.no_grad):
        return model(**{name: value.clone() for name, value in case.inputs.items()})


def same(got: Any, expected: Any) -> bool:
    if isinstance(got, Tensor):
        return torch.equal(got, expected)
    return len(got) == len(expected) > 0 and all(map(same, got, expected))


def check_unmodified(pair: Pair, case: Case, reason: Reason) -> None:
    """Check that results equal the model's, and that the reason is counted and reported."""
    for _ in range(2):
        assert same(call(pair.model, case), call(pair.reference, case))
    stats, report = pair.engine.stats(), pair.engine.last_report
    assert stats["calls"] == {"cold": 0, "warm": 0, "bypass": 2 * case.reported}
    assert stats["refusals"] == ({reason.value: 1} if case.raises else {})
    assert (report is None) == (not case.reported)
    if report is not None:
        assert (report["mode"], report["spans"]) == ("bypass", ())
        assert f"[{reason.value}]" in report["reason"]


def test_reasons_are_covered() -> None:
    elsewhere = {
        Reason.LOWERING_FAILED,
        Reason.NO_COMPILER,  # tests/runtime/test_unmodified.py
        Reason.NO_LOGITS,  # refuses shadow runs: tests/runtime/test_shadow.py
        Reason.RANDOM,  # tests/analysis/test_computation.py
        Reason.UNCOMPILED,  # of calls without a graph: tests/runtime/test_regions.py
        Reason.WEIGHTS_UNREADABLE,  # refuses calls: tests/capture/test_wrapped.py
    }
    elsewhere.add(Reason.DRY_RUN)  # of all calls with the option: tests/test_dry_run.py
    of_calls_and_spans = {  # tests/runtime/test_reasons.py
        Reason.NO_SPAN, Reason.ONE_TOKEN, Reason.MISMATCH, Reason.CANNOT_WRITE, Reason.TOO_FEW_ROWS,
        Reason.GUARDED, Reason.NO_PLAN, Reason.PROGRAM_FAILED, Reason.NEW_ITEM, Reason.NOT_RECORDED,
        Reason.OTHER_WEIGHTS, Reason.TOO_LARGE, Reason.STORE_CLOSED, Reason.STORE_FAILED,
        Reason.INCOMPATIBLE_ENTRY, Reason.RECOMPUTED_TO_RECORD,
        Reason.RECOMPUTED_TO_REFINE, Reason.OTHER_ENCODING, Reason.OTHER_POSITIONS,
        Reason.OTHER_COMPUTATION, Reason.EVICTED, Reason.DAMAGED_ENTRY, Reason.OTHER_TEXT, Reason.NO_PREFIX,
    }  # fmt: skip
    assert {*CASES, *elsewhere, *of_calls_and_spans} == set(Reason)


@pytest.mark.parametrize("reason", CASES)
def test_refused_models_run_unmodified(reason: Reason) -> None:
    check_unmodified(with_api(CASES[reason].model()), CASES[reason], reason)


@pytest.mark.parametrize("reason", [reason for reason, case in CASES.items() if case.raises])
def test_strict_raises_the_reason(reason: Reason) -> None:
    pair = with_api(CASES[reason].model(), strict=True)
    with pytest.raises(UnsupportedGraphError) as refusal:
        call(pair.model, CASES[reason])
    assert refusal.value.reason is reason


@pytest.mark.parametrize("reason", [reason for reason, case in CASES.items() if not case.raises])
def test_strict_accepts_graphs_without_error(reason: Reason) -> None:
    check_unmodified(with_api(CASES[reason].model(), strict=True), CASES[reason], reason)


# Programs that do not compile -------------------------------------------------------------------------------


@pytest.fixture
def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = EagerLowering.lower

    def fails(self: EagerLowering, graph_module: Any, *, name: str) -> Any:
        if name == "encoder":
            return lower(self, graph_module, name=name)
        raise LoweringError("deliberate")

    monkeypatch.setattr(EagerLowering, "lower", fails)


LOWERED = Case(tiny_vlm, ONE)


@pytest.mark.usefixtures("_broken")
def test_lowering_failure_runs_model() -> None:
    """Programs are lowered in their first call: the graph is not refused, its calls are bypasses."""
    pair = with_api(tiny_vlm())
    for _ in range(2):
        assert same(call(pair.model, LOWERED), call(pair.reference, LOWERED))
        assert (pair.report["mode"], pair.report["reason"]) == (
            "bypass",
            "the rewritten graph did not compile",
        )
    assert pair.engine.stats()["refusals"] == {Reason.LOWERING_FAILED.value: 1}


@pytest.mark.usefixtures("_broken")
def test_strict_raises_lowering_failure() -> None:
    pair = with_api(tiny_vlm(), strict=True)
    with pytest.raises(UnsupportedGraphError, match="deliberate") as refusal:
        call(pair.model, LOWERED)
    assert refusal.value.reason is Reason.LOWERING_FAILED
