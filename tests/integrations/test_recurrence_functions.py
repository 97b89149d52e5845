"""Substitutes compute what transformers' torch code computes, with the same arguments."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.integrations.recurrence_functions import delta_rule, delta_rule_of_rows, state_space_scan

pytest.importorskip("transformers")
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

import vlcache_fx.ops  # noqa: F401 (defines the operator)

BATCH, GROUPS, HEADS, DIM, WIDTH = 2, 2, 4, 8, 6

RULES = [
    pytest.param(delta_rule, qwen.torch_chunk_gated_delta_rule, False, id="chunk_gated_delta_rule"),
    pytest.param(
        delta_rule_of_rows,
        qwen.torch_recurrent_gated_delta_rule,
        False,
        id="fused_recurrent_gated_delta_rule",
    ),
    pytest.param(delta_rule, kimi.chunk_kimi_delta_attention, True, id="chunk_kda"),
    pytest.param(delta_rule_of_rows, kimi.recurrent_kimi_delta_attention, True, id="fused_recurrent_kda"),
]


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, check_stride=False)


def rule_inputs(rows: int, by_channel: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    groups = HEADS if by_channel else GROUPS  # Kimi's torch code has no grouped heads
    decays = (BATCH, rows, HEADS, DIM) if by_channel else (BATCH, rows, HEADS)
    return (
        torch.randn(BATCH, rows, groups, DIM, dtype=dtype),
        torch.randn(BATCH, rows, groups, DIM, dtype=dtype),
        torch.randn(BATCH, rows, HEADS, WIDTH, dtype=dtype),
        -torch.rand(decays),
        torch.rand(BATCH, rows, HEADS, dtype=dtype),
    )


@pytest.mark.parametrize("rows", [2, 64, 100])
@pytest.mark.parametrize(("computes", "original", "by_channel"), RULES)
def test_delta_rule(
    computes: Callable[..., Any], original: Callable[..., Any], by_channel: bool, rows: int
) -> None:
    inputs = rule_inputs(rows, by_channel)
    options = {
        "initial_state": torch.randn(BATCH, HEADS, DIM, WIDTH),
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
    }
    same(computes(*inputs, **options), inspect.unwrap(original)(*inputs, **options))


def test_delta_rule_without_state() -> None:
    """Keys as small as without normalisation they must be: else the torch code overflows too."""
    query, key, value, g, beta = rule_inputs(70, by_channel=False)
    inputs = query, key / 8, value, g, beta
    outputs, state = delta_rule(*inputs, chunk_size=16) or ()
    expected, _ = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)(*inputs)
    same(outputs, expected)
    assert state is None


def test_delta_rule_keeps_the_dtype_of_queries() -> None:
    inputs = rule_inputs(70, by_channel=False, dtype=torch.bfloat16)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    got = delta_rule(*inputs, **options)
    expected = inspect.unwrap(qwen.torch_chunk_gated_delta_rule)(*inputs, **options)
    assert got is not None
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=2**-7)
    same(got[1], expected[1])


def test_delta_rule_scale() -> None:
    inputs = rule_inputs(5, by_channel=False)
    got, default = delta_rule(*inputs, scale=1.0), delta_rule(*inputs)
    assert got is not None
    assert default is not None
    same(got[0], default[0] * DIM**0.5)


def test_single_rows_are_left_to_the_original() -> None:
    assert delta_rule_of_rows(*rule_inputs(1, by_channel=False)) is None


def scan_inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    return (
        torch.randn(BATCH, rows, HEADS, WIDTH, dtype=dtype),
        torch.randn(BATCH, rows, HEADS, dtype=dtype),
        -torch.rand(HEADS) * 4,
        torch.randn(BATCH, rows, GROUPS, DIM, dtype=dtype),
        torch.randn(BATCH, rows, GROUPS, DIM, dtype=dtype),
    )


SCANS: list[dict[str, Any]] = [
    {"dt_softplus": True},
    {"dt_softplus": True, "dt_bias": torch.linspace(-1, 1, HEADS), "D": torch.linspace(1, 2, HEADS)},
    {"dt_softplus": True, "dt_limit": (0.1, 0.9), "return_final_states": True},
    {
        "dt_softplus": True,
        "initial_states": torch.ones(BATCH, HEADS, WIDTH, DIM),
        "return_final_states": True,
    },
    {"z": None, "seq_idx": None},
]


@pytest.mark.parametrize("options", SCANS, ids="-".join)
@pytest.mark.parametrize("rows", [1, 64, 100])
def test_state_space_scan(rows: int, options: dict[str, Any]) -> None:
    inputs = scan_inputs(rows)
    expected = inspect.unwrap(mamba2.mamba2_chunk_scan)(*inputs, chunk_size=32, **options)
    same(state_space_scan(*inputs, chunk_size=32, **options), expected)


def test_state_space_scan_in_bfloat16() -> None:
    inputs, options = scan_inputs(70, torch.bfloat16), {"dt_softplus": True, "return_final_states": True}
    expected = inspect.unwrap(mamba2.mamba2_chunk_scan)(*inputs, chunk_size=32, **options)
    same(state_space_scan(*inputs, **options), expected)


def test_state_space_scan_gate_and_weights_per_channel() -> None:
    """Options of ``mamba_ssm`` that transformers' torch code lacks."""
    inputs, gate = scan_inputs(9), torch.randn(BATCH, 9, HEADS, WIDTH)
    weights = torch.randn(HEADS, WIDTH)
    plain = state_space_scan(*inputs, dt_softplus=True)
    got = state_space_scan(*inputs, dt_softplus=True, D=weights, z=gate)
    assert isinstance(plain, Tensor)
    same(got, (plain + inputs[0] * weights) * F.silu(gate))


def test_unknown_arguments_are_left_to_the_original() -> None:
    lengths = torch.tensor([0, 3, 9])
    assert delta_rule(*rule_inputs(9, by_channel=False), cu_seqlens=lengths) is None
    assert state_space_scan(*scan_inputs(9), seq_idx=lengths) is None
    assert state_space_scan(*scan_inputs(9), dt_min=math.inf) is None
    assert delta_rule(*rule_inputs(9, by_channel=False)[:4]) is None
    assert delta_rule(*rule_inputs(9, by_channel=False), cu_seqlens=None, safe_gate=False) is not None
