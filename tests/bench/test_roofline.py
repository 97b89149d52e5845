import dataclasses

import pytest
import torch

from vlcache_fx.bench.model import DecoderSize
from vlcache_fx.bench.rates import Rates, measure_rates
from vlcache_fx.bench.roofline import Bound, bound

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 4, 2, 2
KV_WEIGHTS = 2 * HIDDEN * KV_HEADS * HEAD_DIM
OTHER_WEIGHTS = 1000
SIZE = DecoderSize(
    layers=LAYERS,
    hidden=HIDDEN,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    vocabulary=16,
    weights_of_layers=(KV_WEIGHTS + OTHER_WEIGHTS,) * LAYERS,
    head_weights=128,
    item_bytes=2,
    experts=False,
    parameters=5000,
)
COMPUTE, MEMORY = Rates(1.0, 1e30, 1.0), Rates(1e30, 1.0, 1.0)
TEXT = [0, 1, 6, 7]
"""Text around four vision tokens at 2 to 5."""


def found(rates: Rates, rows: list[int], batch: int = 1) -> Bound:
    result = bound(SIZE, rates, rows, 8, TEXT, batch)
    assert result is not None
    return result


def test_bound_flops_of_full_rows() -> None:
    projections = 2 * LAYERS * 8 * (KV_WEIGHTS + OTHER_WEIGHTS)
    attention = LAYERS * 4 * HEADS * HEAD_DIM * sum(range(1, 9))
    result = found(COMPUTE, [8, 8, 8])
    assert result.flops == projections + attention + 2 * SIZE.head_weights
    assert result.seconds == result.flops
    assert result.limited_by == "compute"


def test_bound_rows_of_keys_and_queries() -> None:
    # Layer 0: K/V of 5 rows, the rest of the same (text, first vision token). Layer 1: 5, and 1.
    projections = 2 * (KV_WEIGHTS * (5 + 5) + OTHER_WEIGHTS * (5 + 1))
    pairs = (1 + 2 + 3 + 7 + 8) + 8
    result = found(COMPUTE, [5, 5, 1])
    assert result.flops == projections + 4 * HEADS * HEAD_DIM * pairs + 2 * SIZE.head_weights


def test_bound_bytes() -> None:
    result = found(MEMORY, [5, 5, 1])
    assert result.nbytes == 2 * (SIZE.layer_weights + 128) + 8 * LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    assert result.limited_by == "memory"
    assert result.seconds == result.nbytes


def test_bound_batch_shares_weights() -> None:
    one, two = found(MEMORY, [8, 8, 1]), found(MEMORY, [8, 8, 1], batch=2)
    assert two.flops == 2 * one.flops
    assert two.nbytes - one.nbytes == 8 * SIZE.kv_bytes_per_token


def test_bound_of_a_hybrid() -> None:
    """A recurrent layer has no pairs of queries and keys, but a state of constant size."""
    hybrid = dataclasses.replace(SIZE, has_attention=(False, True), state_values=50)
    result = bound(hybrid, COMPUTE, [5, 5, 1], 8, TEXT)
    assert result is not None
    recurrent = 2 * (KV_WEIGHTS + OTHER_WEIGHTS) * 5 + 6 * 50 * 5
    attention = 2 * (KV_WEIGHTS * 5 + OTHER_WEIGHTS) + 4 * HEADS * HEAD_DIM * 8
    assert result.flops == recurrent + attention + 2 * SIZE.head_weights
    weights = 2 * (SIZE.layer_weights + 128)
    assert result.nbytes == weights + 8 * 2 * KV_HEADS * HEAD_DIM * 2 + 50 * 4


def test_bound_none_for_experts() -> None:
    assert bound(dataclasses.replace(SIZE, experts=True), COMPUTE, [8, 8, 1], 8, TEXT) is None


def test_measure_rates_positive() -> None:
    rates = measure_rates(torch.float32, torch.device("cpu"), width=16, size_bytes=4096)
    assert min(dataclasses.astuple(rates)) > 0


def test_bound_is_monotonic_in_rows() -> None:
    seconds = [found(COMPUTE, [rows, rows, 1]).seconds for rows in range(4, 9)]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]
    assert found(COMPUTE, [5, 5, 1]).seconds == pytest.approx(seconds[1])
