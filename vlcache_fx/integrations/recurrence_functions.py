"""Linear recurrences of well-known libraries as one operator, ``torch.ops.vlcache.recur``.

Each function takes the arguments of a kernel of flash-linear-attention (``fla``) or ``mamba_ssm`` by name,
and returns what the kernel returns, and transformers' torch code in its place. It returns None where it does
not know an argument: the caller then runs the original. Dynamo traces these functions.

Argument names and layouts: ``fla/ops/gated_delta_rule/chunk.py``, ``fla/ops/kda/chunk.py`` and
``mamba_ssm/ops/triton/ssd_combined.py``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["delta_rule", "delta_rule_of_rows", "state_space_scan"]

Recurred = tuple[Tensor, Tensor | None]
"""Outputs [batch, tokens, heads, value dim], and the state behind the last token, if asked for."""


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int | None = None,  # noqa: ARG001 (how a kernel computes, not what)
    **unknown: Any,
) -> Recurred | None:
    """Compute ``chunk_gated_delta_rule`` or ``chunk_kda``: a gated delta rule over all tokens.

    Args:
        query: [batch, tokens, key heads, key dim].
        key: like ``query``.
        value: [batch, tokens, heads, value dim]; ``heads`` is a multiple of the number of key heads.
        g: log of the decay, [batch, tokens, heads], or [batch, tokens, heads, key dim] for KDA.
        beta: share of the new value that is written, [batch, tokens, heads].
        scale: factor of the outputs; key dim ** -0.5 by default.
        initial_state: [batch, heads, key dim, value dim].
        output_final_state: False: None is returned in the state's place.
        use_qk_l2norm_in_kernel: normalise ``query`` and ``key``.
        chunk_size: without effect.
        **unknown: arguments that must be None or False.
    """
    if g is None or beta is None or _any_given(unknown):
        return None
    outputs, final_state, *_ = torch.ops.vlcache.recur(
        query, key, value, g, beta, initial_state, scale=scale, l2norm=use_qk_l2norm_in_kernel
    )
    return outputs, final_state if output_final_state else None


def delta_rule_of_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    **options: Any,
) -> Recurred | None:
    """Compute ``fused_recurrent_gated_delta_rule`` or ``fused_recurrent_kda``, see ``delta_rule``.

    One token is left to the original: the graph of a decoding step stays as it was.
    """
    return None if query.shape[1] == 1 else delta_rule(query, key, value, g, beta, **options)


def state_space_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 (the names of mamba_ssm)
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    chunk_size: int | None = None,  # noqa: ARG001 (how a kernel computes, not what)
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """Compute ``mamba_chunk_scan_combined``: the state space model of Mamba 2 over all tokens.

    Args:
        hidden_states: [batch, tokens, heads, head dim].
        dt: time steps, [batch, tokens, heads].
        A: log of the decay per unit of time, [heads].
        B: how tokens enter the state, [batch, tokens, groups, state dim].
        C: how tokens read the state, like ``B``.
        chunk_size: without effect.
        D: weight of ``hidden_states`` in the outputs, [heads] or [heads, head dim].
        z: gate of the outputs, like ``hidden_states``.
        dt_bias: added to ``dt``, [heads].
        initial_states: [batch, heads, head dim, state dim].
        dt_softplus: apply softplus to ``dt``, behind the bias.
        dt_limit: bounds of ``dt``, behind softplus.
        return_final_states: return the state behind the last token as well.
        **unknown: arguments that must be None or False.

    Returns:
        float32 [batch, tokens, heads, head dim], and the state if asked for.
    """
    if _any_given(unknown):
        return None
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(min=dt_limit[0], max=dt_limit[1]).float()
    inputs = hidden_states.float()
    # The operator's states are [batch, heads, state dim, head dim].
    state = None if initial_states is None else initial_states.transpose(-1, -2)
    outputs, final_state, *_ = torch.ops.vlcache.recur(
        C.float(), B.float(), inputs * dt[..., None], A.float() * dt, None, state, scale=1.0
    )
    if D is not None:
        outputs = outputs + inputs * (D if D.dim() == 2 else D[:, None])
    if z is not None:
        outputs = outputs * F.silu(z.float())
    return (outputs, final_state.transpose(-1, -2)) if return_final_states else outputs


def _any_given(arguments: dict[str, Any]) -> bool:
    return any(value is not None and value is not False for value in arguments.values())
