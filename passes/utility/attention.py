"""Helpers of passes for attention calls."""

from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import ATTEND, SDPA, Site

aten = torch.ops.aten

MOVES = frozenset(
    {aten.transpose.int, aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor}
)


def gqa_needs_math_kernel(target: Any, value: Any, mask: Any) -> bool:
    """Return True where ``enable_gqa`` would be slower than repeated key and value heads.

    On CUDA, the fused kernels with a mask need as many key heads as query heads. With fewer, PyTorch falls
    back to the math kernel, which materialises all scores.
    """
    return target is SDPA and mask is not None and bool(value.device.type == "cuda")


def update_call(site: Site) -> None:
    """Set the arguments of the call ``site.node`` to those of ``site``."""
    operands = (site.query, site.key, site.value, site.mask)
    if site.node.target is ATTEND:
        site.node.args = (
            *operands,
            site.sinks,
            site.is_causal,
            site.scale,
            site.softcap,
            site.enable_gqa,
        )
        site.node.kwargs = {}
        return
    dropout = site.node.args[4] if len(site.node.args) > 4 else site.node.kwargs.get("dropout_p")
    given = {"dropout_p": dropout or None, "is_causal": site.is_causal or None}
    site.node.args = operands
    site.node.kwargs = {
        **{name: value for name, value in given.items() if value is not None},
        "scale": site.scale,
        "enable_gqa": site.enable_gqa,
    }


def views_to_reshapes(result: Node) -> None:
    """Replace views of ``result`` by reshapes, since a call may return another layout."""
    todo, seen = [result], {result}
    while todo:
        for user in todo.pop().users:
            if user.target in (aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            elif user.target in MOVES and user not in seen:
                seen.add(user)
                todo.append(user)
