"""Shadow runs: logits, their comparison, results, and the bypass after violations."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from vlcache_fx.analysis import analyze
from vlcache_fx.backend import engine_for
from vlcache_fx.compiler.builders.logits import find_logits
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.guards.shadow import compare, compared_rows
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

from ...models import batch_of, padded
from ..helpers import Pair, vlcache_store, with_backend

# Which results are logits -----------------------------------------------------------------------------------


class Returning(TinyVlm):
    """Returns other values besides logits or instead; may write logits to an input."""

    kind = "both"

    def forward(self, input_ids: Tensor, pixel_values: Tensor, state: Tensor | None = None) -> Any:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        for layer in self.decoder.layers:
            x = layer(x, None, None)
        hidden = self.decoder.norm(x)
        if self.kind == "hidden":
            return hidden
        logits = self.decoder.head(hidden[:, -1:])
        if state is not None:
            state.add_(logits)
            return logits.exp()
        return hidden[:, -1:].tanh(), logits.mean(), logits


def returning(kind: str) -> Any:
    return tiny_vlm(cls=Returning, kind=kind, rope="none")


ONE = tiny_vlm_inputs(3, 5, [(20, 0)])


@pytest.mark.parametrize(
    ("model", "index"),
    [(tiny_vlm, 0), (lambda: tiny_vlm(last_only=False), 0), (lambda: returning("both"), 2)],
)
def test_find_logits_by_width(model: Any, index: int) -> None:
    captured, _ = captured_graph(model(), ONE)
    assert find_logits(captured, analyze(captured)) == index


def test_find_logits_refuses_hidden_states() -> None:
    captured, _ = captured_graph(returning("hidden"), ONE)
    with pytest.raises(UnsupportedGraphError, match="a width other than 16") as refusal:
        find_logits(captured, analyze(captured))
    assert refusal.value.reason is Reason.NO_LOGITS


def test_no_shadow_runs_without_logits(caplog: pytest.LogCaptureFixture) -> None:
    pair = with_backend(returning("hidden"), shadow=1.0)
    with caplog.at_level(logging.WARNING, logger="vlcache_fx"):
        modes = [pair.run(**tiny_vlm_inputs(3 + n, 5, [(20, 0)], text_seed=n))[1]["mode"] for n in range(3)]
    assert modes == ["cold", "warm", "warm"]
    assert pair.engine.stats()["refusals"] == {"no_logits": 1}
    assert pair.engine.stats()["shadow"]["runs"] == 0
    assert caplog.text.count("no shadow runs: graph not supported [no_logits]") == 1
    strict = with_backend(returning("hidden"), shadow=1.0, strict=True)
    with pytest.raises(BackendCompilerFailed, match="no_logits"), torch.no_grad():
        strict.model(**ONE)


# How they are compared --------------------------------------------------------------------------------------


def logits_of(*shares: float) -> Tensor:
    return torch.tensor(shares).log()


def test_kl_per_row() -> None:
    exact = torch.stack([logits_of(0.5, 0.5, 0.0), logits_of(0.9, 0.1, 0.0)])[None]
    reused = torch.stack([logits_of(0.25, 0.75, 0.0), logits_of(0.9, 0.1, 0.0)])[None]
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = compare(exact, reused + 7.0, [None])
    assert found.kl == pytest.approx(first / 2, abs=1e-6)
    assert not found.flip
    assert compare(exact, reused, [torch.tensor([0])]).kl == pytest.approx(first, abs=1e-6)
    assert compare(exact, reused, [None], [0]).flip
    assert compare(exact, exact, [None]).kl == 0.0
    assert compare(logits_of(0.5, 0.5)[None], logits_of(1.0, 0.0)[None], [None]).kl == math.inf


def test_compare_weights_samples_equally() -> None:
    exact = torch.zeros(2, 100, 4, dtype=torch.bfloat16)
    reused = exact.clone()
    reused[1, 3, 0] = 2.0
    one = compare(exact[1:, 3:4], reused[1:, 3:4], [None]).kl
    found = compare(exact, reused, [None, torch.tensor([3, 4])])
    assert found.kl == pytest.approx((0 + one / 2) / 2)
    assert one > 0.1


def test_compared_rows() -> None:
    spans = (Span(0, 2, 4, "image", True),)
    samples = (Sample(0, (), spans, padding=torch.tensor([8, 9])), Sample(1, (), ()))
    request = Request([], [], 10, samples, None)
    rows, last = compared_rows(request, None, 10)
    assert [None if one is None else one.tolist() for one in rows] == [[0, 1, 6, 7], list(range(10))]
    assert last == [7, 9]
    assert compared_rows(request, torch.tensor([9]), 1) == ([torch.tensor([0])] * 2, [0, 0])
    assert compared_rows(request, None, 3) == ([None, None], None)  # the tokens of these rows are unknown


# What a request gets ----------------------------------------------------------------------------------------


def prompt(seed: int) -> dict[str, Tensor]:
    return tiny_vlm_inputs(3 + seed, 6, [(24, 0)], text_seed=seed)


@pytest.fixture(scope="module")
def shadowed(_compiler: None) -> Pair:
    options = {"shadow_max_kl": 0.0, "shadow_max_violations": 2}
    return with_backend(tiny_vlm(last_only=False), policy="none", shadow=0.5, **options)


@pytest.fixture
def vlm(shadowed: Pair) -> Pair:
    shadowed.engine.clear()
    shadowed.engine.resume()
    return shadowed


def test_every_other_warm_request_has_shadow_run(vlm: Pair) -> None:
    before = vlm.engine.stats()["shadow"]
    seen = [vlm.run(**prompt(seed)) for seed in range(4)]
    assert [report["mode"] for _, report in seen] == ["cold", "warm", "warm", "warm"]
    assert [report["shadow_kl"] is not None for _, report in seen] == [False, False, True, False]
    assert [off == 0.0 for off, _ in seen] == [True, False, True, False]  # the exact results are returned
    assert [report["spans"][0]["donor_contexts"] for _, report in seen] == [0, 1, 1, 2]
    shadow, report = vlm.engine.stats()["shadow"], seen[2][1]
    assert shadow["runs"] - before["runs"] == 1
    assert shadow["max_kl"] >= report["shadow_kl"] > 0
    assert "shadow" in report["timings_ms"]
    assert report["rows_per_layer"][0] < report["num_tokens"]


def test_no_shadow_run_of_exact_prefixes(vlm: Pair) -> None:
    before = vlm.engine.stats()["shadow"]["runs"]
    for _ in range(4):
        vlm.run(**prompt(0))
    assert vlm.engine.stats()["shadow"]["runs"] == before


def test_violations_bypass_until_resume(vlm: Pair, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vlcache_fx"):
        modes = [vlm.run(**prompt(seed))[1]["mode"] for seed in range(5)]
        assert modes == ["cold", *["warm"] * 4]
        for seed in (7, 8):
            off, report = vlm.run(**prompt(seed))
            assert report["mode"] == "bypass"
            assert off == 0.0
            assert "2 shadow runs" in report["reason"]
    assert caplog.text.count("continuing without reuse") == 1
    # Other weights are another model, which is not bypassed.
    weight = vlm.model.decoder.layers[0].attention.value.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
        assert vlm.run(**prompt(9))[1]["mode"] == "cold"
        weight.copy_(kept)
    assert vlm.run(**prompt(8))[1]["mode"] == "bypass"
    vlm.engine.resume()
    assert vlm.run(**prompt(8))[1]["mode"] == "warm"


def test_padding_is_not_compared() -> None:
    """Rows of padding are not computed, so their logits are meaningless."""
    pair = with_backend(padded(num_layers=2, last_only=False), policy="uniform", budget=1.0, shadow=1.0)
    for seed in range(3):
        pair.run(**batch_of(prompt(seed), tiny_vlm_inputs(9, 20, [(26, 1)], text_seed=seed), left=False))
    assert pair.engine.stats()["shadow"]["runs"] == 2
    assert pair.engine.stats()["shadow"]["max_kl"] < 1e-9
    assert pair.engine.stats()["shadow"]["violations"] == 0


def test_shadow_run_applies_mutations_once() -> None:
    model = returning("written")
    reference = copy.deepcopy(model)
    options = {"lowering": "eager", "store": vlcache_store(), "policy": "none", "shadow": 1.0}
    model.forward = torch.compile(model.forward, backend="vlcache", options=options, dynamic=True)
    for seed in range(3):
        states = [torch.full((1, 1, reference.decoder.head.out_features), float(seed)) for _ in range(2)]
        with torch.no_grad():
            got, want = (
                one(**prompt(seed), state=state)
                for one, state in zip((model, reference), states, strict=True)
            )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*states)
    assert engine_for(options).stats()["shadow"]["runs"] == 2
