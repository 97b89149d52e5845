"""``vlcache.recur`` against the functions of transformers that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo_hybrid
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from tests.ops.recurrences import error, inputs, recur

LENGTHS = [1, 63, 64, 65, 200]
ROUNDING = 2e-5
"""Limit of relative errors in float32; 5e-6 is seen, where transformers sums strong decays in float32."""


def own_code(function: Any) -> Callable[..., Any]:
    """Return transformers' own code, where a kernel of a package takes its place."""
    result: Callable[..., Any] = function.__wrapped__
    return result


DELTA_RULES = {
    "qwen3_next-chunks": qwen3_next.torch_chunk_gated_delta_rule,
    "qwen3_next-tokens": qwen3_next.torch_recurrent_gated_delta_rule,
    "olmo_hybrid-chunks": olmo_hybrid.torch_chunk_gated_delta_rule,
}
KDA = {
    "kimi_linear-chunks": kimi_linear.chunk_kimi_delta_attention,
    "kimi_linear-tokens": kimi_linear.recurrent_kimi_delta_attention,
}


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("name", [*DELTA_RULES, *KDA])
@pytest.mark.parametrize("has_state", [False, True])
def test_recur_equals_delta_rules(name: str, rows: int, has_state: bool) -> None:
    is_kda = name in KDA
    heads = {"heads": 4, "groups": 4 if is_kda else 2}
    tensors = inputs(rows, batch=2, dim=16, width=12, kind="kda" if is_kda else "delta", **heads)
    state = tensors.pop("state")
    state = state if has_state else None
    out, final = own_code({**DELTA_RULES, **KDA}[name])(
        *tensors.values(), initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    got = recur(**tensors, state=state, l2norm=True)
    assert max(error(got[0], out), error(got[1], final)) < ROUNDING
    assert got[0].dtype == out.dtype


@pytest.mark.parametrize("rows", [1, 70])
def test_recur_equals_delta_rule_in_bfloat16(rows: int) -> None:
    tensors = inputs(rows, dim=16, dtype=torch.bfloat16)
    state, tensors["g"] = tensors.pop("state").float(), tensors["g"].float()
    function = own_code(qwen3_next.torch_chunk_gated_delta_rule)
    out, final = function(*tensors.values(), initial_state=state, output_final_state=True)
    got = recur(**tensors, state=state)
    assert got[0].dtype == out.dtype == torch.bfloat16
    assert error(got[1], final) < ROUNDING
    assert error(got[0], out) < 0.01


def mamba2_inputs(rows: int) -> dict[str, Tensor]:
    """Return arguments of transformers' function: 6 heads of 8 in 2 groups, and states of 16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    return {
        "hidden_states": normal(2, rows, 6, 8),
        "dt": normal(2, rows, 6),
        "A": -normal(6).exp(),
        "B": normal(2, rows, 2, 16),
        "C": normal(2, rows, 2, 16),
        "D": normal(6),
        "dt_bias": normal(6),
    }


def as_mamba2(given: dict[str, Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return outputs and the final state [batch, heads, head dim, state dim] of Mamba 2, by ``recur``."""
    dt = torch.nn.functional.softplus(given["dt"] + given["dt_bias"])
    v = given["hidden_states"] * dt[..., None]
    entering = None if state is None else state.transpose(-1, -2)
    out, final, *_ = recur(given["C"], given["B"], v, dt * given["A"], state=entering, scale=1.0)
    return out + given["hidden_states"] * given["D"][:, None], final.transpose(-1, -2)


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("has_state", [False, True])
def test_recur_equals_mamba2(rows: int, has_state: bool) -> None:
    given = mamba2_inputs(rows)
    state = torch.randn(2, 6, 8, 16, generator=torch.Generator().manual_seed(1)) if has_state else None
    out, final = own_code(mamba2.mamba2_chunk_scan)(
        **given, chunk_size=32, initial_states=state, dt_softplus=True, return_final_states=True
    )
    got = as_mamba2(given, state)
    assert max(error(got[0], out), error(got[1], final)) < ROUNDING


def test_recur_equals_a_decoding_step_of_mamba2() -> None:
    given = mamba2_inputs(1)
    state = torch.randn(2, 6, 8, 16, generator=torch.Generator().manual_seed(1))
    got = as_mamba2(given, state)
    one = {name: x[:, 0] if x.dim() > 1 else x for name, x in given.items()}
    # The function wants what is shared by a head's channels to be repeated.
    one["dt"] = one["dt"][..., None].expand(-1, -1, 8)
    one["A"] = one["A"][:, None, None].expand(-1, 8, 16)
    one["D"], one["dt_bias"] = (one[name][:, None].expand(-1, 8) for name in ("D", "dt_bias"))
    out = own_code(mamba2.mamba2_selective_state_update)(
        state, one["hidden_states"], one["dt"], one["A"], one["B"], one["C"], one["D"],
        dt_bias=one["dt_bias"], dt_softplus=True,
    )  # fmt: skip
    assert max(error(got[0][:, 0], out), error(got[1], state)) < ROUNDING
