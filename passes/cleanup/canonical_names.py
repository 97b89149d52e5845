"""Give operators with several names the one that analysis knows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch._ops import OpOverload

from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "absolute": "abs",
        "clip": "clamp",
        "concat": "cat",
        "concatenate": "cat",
        "divide": "div",
        "true_divide": "div",
        "greater": "gt",
        "greater_equal": "ge",
        "less": "lt",
        "less_equal": "le",
        "multiply": "mul",
        "negative": "neg",
        "not_equal": "ne",
        "special_expit": "sigmoid",
        "subtract": "sub",
    }
)
"""ATen operators that only call another one with the same arguments -> that one."""


class CanonicalNames(Pass):
    """``aten.multiply`` becomes ``aten.mul``, and so on; arguments stay as they are."""

    name: ClassVar[str] = "canonical_names"

    def run(self, program: Program) -> bool:
        """Replace the targets of calls."""
        changed = False
        for node in program.graph.nodes:
            packet, overload = _named(node.target)
            if packet in NAMES:
                node.target = getattr(getattr(aten, NAMES[packet]), overload)
                changed = True
        return changed


def _named(target: object) -> tuple[str, str]:
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return "", ""
    return target._opname, target._overloadname
