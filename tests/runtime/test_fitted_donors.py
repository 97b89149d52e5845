"""Donors that learn: differences of contexts are stored and fitted, and where contexts come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.runtime import idle
from vlcache_fx.runtime.donors import idle_refiner, subspace
from vlcache_fx.runtime.guards.shadow import kl_per_row
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..models import batch_of, padded
from .helpers import Pair, settings_of, with_api, with_backend

IMAGES = ((40, 0), (300, 1))


def prompt(seed: int, images: tuple[tuple[int, int], ...] = IMAGES, after: int = 30) -> dict[str, Tensor]:
    return tiny_vlm_inputs(20, after, list(images), text_seed=seed)


@pytest.fixture(autouse=True, scope="module")
def any_bytes() -> Iterator[None]:
    """Rows of the tiny model are so narrow that differences would take too many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace, "LARGEST_SHARE", 10.0)
        yield


def contexts(report: Any) -> list[int]:
    return [span["donor_contexts"] for span in report["spans"]]


def learning(rank: int, **options: Any) -> Pair:
    given = {"policy": "first_k", "budget": 0.2, "donor_contexts": 6, "strict": True, "donor_rank": rank}
    return with_backend(tiny_vlm(num_layers=2), **{**given, **options})


SHADOW = {"shadow": 1.0, "shadow_max_violations": 10**6}


def mean_kl(pair: Pair) -> float:
    """The error behind new prompts, after six contexts from shadow runs."""
    kls = []
    for seed in range(1, 13):
        _, report = pair.run(**prompt(seed))
        if report["mode"] == "warm" and min(contexts(report)) == 6:
            kls.append(report["shadow_kl"])
    assert len(kls) == 6
    return sum(kls) / len(kls)


@pytest.fixture(scope="module")
def kl_of_means() -> float:
    return mean_kl(learning(0, **SHADOW))


@pytest.mark.usefixtures("_compiler")
def test_fitted_donors_are_closer_with_one_program(kl_of_means: float) -> None:
    """Numbers of images, of contexts, of tokens: nothing is compiled again."""
    pair = learning(4, lowering="inductor", **SHADOW)
    for seed in range(1, 4):
        pair.run(**prompt(seed))
    before = pair.engine.stats()["compilations"]
    assert mean_kl(pair) < 0.6 * kl_of_means
    for seed, images in enumerate((IMAGES[:1], IMAGES[1:], IMAGES[::-1], (*IMAGES, (40, 0)))):
        off, report = pair.run(**prompt(seed + 20, images, after=9 + seed))
        assert report["mode"] == "warm"
        assert off <= 1e-5  # that of the shadow run
    assert pair.engine.stats()["compilations"] == before


@pytest.mark.thorough  # with Inductor's above; ops/test_fit.py compares kernels
def test_fitted_donors_with_eager_kernels(kl_of_means: float) -> None:
    assert mean_kl(learning(4, **SHADOW)) < 0.6 * kl_of_means


def test_packed_means_are_fitted_too() -> None:
    packed, fitted = (learning(rank, donor_dtype="int8", **SHADOW) for rank in (0, 4))
    assert mean_kl(fitted) < mean_kl(packed)


def test_full_recompute_is_exact() -> None:
    pair = learning(4, **SHADOW)
    for seed in range(1, 5):
        pair.run(**prompt(seed))
    with pair.engine.guards.off(), pair.engine.using(policy="full"):
        off, report = pair.run(**prompt(9))
    assert (report["mode"], min(contexts(report))) == ("warm", 4)
    assert off <= 1e-5


def test_exact_prefix_is_not_fitted() -> None:
    pair = learning(4, **SHADOW)
    for seed in range(1, 5):
        pair.run(**prompt(seed))
    with pair.engine.guards.off():
        off, report = pair.run(**prompt(4))
    assert (report["prefix_tokens"] > 360, contexts(report)) == (True, [1, 1])
    assert off <= 1e-5


def test_first_returns_are_exact() -> None:
    pair = learning(4, exact_returns=2)
    modes = []
    for seed in range(1, 6):
        off, report = pair.run(**prompt(seed))
        modes.append(report["mode"])
        if report["mode"] == "cold":
            assert off <= 1e-6  # kernels for few rows, here the last one, round otherwise on some CPUs
            wanted = Reason.NEW_ITEM if seed == 1 else Reason.RECOMPUTED_TO_REFINE
            assert {span["miss_reason"] for span in report["spans"]} == {wanted}
    assert modes == ["cold", "cold", "cold", "warm", "warm"]
    assert contexts(report) == [3, 3]
    pair.engine.clear()
    assert pair.run(**prompt(6))[1]["mode"] == "cold"
    assert pair.run(**prompt(7))[1]["reason_code"] == Reason.RECOMPUTED_TO_REFINE


def test_exact_returns_end_where_contexts_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of returns counts, not that of contexts."""
    monkeypatch.setattr(subspace, "LEAST_GAIN", 2.0)
    pair = learning(4, exact_returns=3)
    modes = [pair.run(**prompt(seed))[1]["mode"] for seed in range(1, 7)]
    assert modes == ["cold"] * 4 + ["warm"] * 2
    assert contexts(pair.report) == [2, 2]


@pytest.fixture
def idling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(idle, "QUIET_S", 0.02)
    pair = learning(4, idle_refinement=1.0)
    yield pair
    pair.engine.close()


def test_donors_learn_in_idle_time(idling: Pair) -> None:
    seen = []
    for seed in range(1, 9):
        _, report = idling.run(**prompt(seed))
        assert idling.engine.idle.wait(60)
        seen.append(contexts(report))
    assert seen == [[0, 0], *([count, count] for count in (1, 2, 3, 4, 5, 6, 6))]
    assert idling.engine.stats()["idle_refinements"] == 5
    assert idling.engine.stats()["calls"] == {"cold": 1, "warm": 7, "bypass": 0}


def test_rows_are_those_of_a_cold_call(idling: Pair) -> None:
    """Also if the caller overwrites the tensors that it passed."""
    for seed in (1, 2):
        call = prompt(seed)
        idling.run(**call)
        for tensor in call.values():
            tensor.zero_()
        assert idling.engine.idle.wait(60)
    found = idling.engine.store.get(idling.report["spans"][0]["key"])
    other = learning(4, exact_returns=1)
    for seed in (1, 2):
        other.run(**prompt(seed))
    want = other.engine.store.get(other.report["spans"][0]["key"])
    assert found is not None
    assert want is not None
    assert found.tensors.keys() == want.tensors.keys()
    assert found.info["contexts"] == want.info["contexts"]
    for name, tensor in want.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor)


def test_large_inputs_are_not_kept(idling: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_refiner, "LARGEST_COPY_BYTES", 100)
    for seed in (1, 2):
        _, report = idling.run(**prompt(seed))
    assert report["mode"] == "warm"
    assert idling.engine.idle.wait(0)


def test_other_weights_in_the_meantime(idling: Pair) -> None:
    """Keys cover the weights of the request: what other weights compute is not stored under them."""
    idling.run(**prompt(1))
    _, report = idling.run(**prompt(2))
    with idling.engine.idle.request(), torch.no_grad():
        idling.model.decoder.layers[0].attention.key.weight.add_(1.0)
    assert idling.engine.idle.wait(60)
    entry = idling.engine.store.get(report["spans"][0]["key"])
    assert entry is not None
    assert len(entry.info["contexts"]) == 1  # type: ignore[arg-type]
    assert idling.engine.stats()["idle_refinements"] == 0


QWEN = [(12, 16, 1), (8, 8, 2)]


def batch(seed: int) -> dict[str, Tensor]:
    return batch_of(
        tiny_vlm_inputs(5, 6, [(40, 0)], text_seed=seed), tiny_vlm_inputs(9, 3, [(42, 1)], text_seed=seed)
    )


def next_logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits[:, -1]


@pytest.mark.parametrize(
    ("model", "call"),
    [
        pytest.param(lambda: padded(num_layers=2), batch, id="batch"),
        pytest.param(lambda: tiny_hybrid("dada"), prompt, id="recurrent"),
        pytest.param(
            lambda: tiny_qwen2_5_vl(2), lambda seed: qwen_inputs(7, 5, QWEN, text_seed=seed), id="qwen2_5_vl"
        ),
        pytest.param(
            lambda: tiny_llava(2), lambda seed: llava_inputs(7, 5, [1, 2], text_seed=seed), id="llava"
        ),
    ],
)
def test_other_models(model: Callable[[], Any], call: Callable[[int], dict[str, Any]]) -> None:
    options = {
        "policy": "first_k",
        "budget": 0.2,
        "donor_contexts": 6,
        "strict": True,
        "donor_rank": 4,
        **SHADOW,
    }
    pair = with_api(model(), min_span_tokens=4, **options)
    with torch.no_grad():
        for seed in range(10):
            pair.model(**call(seed))
    assert min(contexts(pair.report)) == 6
    # The same prompts with both; nothing is stored any more.
    errors = {0: 0.0, 4: 0.0}
    with pair.engine.guards.off():
        for rank in errors:
            with settings_of(pair.engine, donor_rank=rank):
                for seed in range(10, 16):
                    with torch.no_grad():
                        got, exact = (next_logits(one(**call(seed))) for one in (pair.model, pair.reference))
                    assert pair.report["mode"] == "warm"
                    errors[rank] += float(kl_per_row(exact.double(), got.double()).mean())
    assert 0 < errors[4] < errors[0]
