"""Parameters of a mask's computation, which its values do not show in a short prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import attribute, packet_of
from vlcache_fx.ir.subgraph import needed_for

aten = torch.ops.aten

SMALLEST_HIDDEN = 1e4
"""Numbers of at least this magnitude hide scores, as infinity does."""

BANDS = frozenset({aten.triu, aten.tril})


def mask_rule(mask: Node, facts: DecoderFacts) -> str:
    """Return the parameters of a mask's computation, such as the width of a window, with their operators.

    Empty if there are none: then the mask's values define it. The values of a window do not, as long as the
    prompt is shorter than the window.
    """
    sizes = [
        *shape_of(facts.stream.boundaries[0])[:2],
        *(size for node in facts.past for size in shape_of(node)),
    ]
    lengths = {size for size in sizes if isinstance(size, int)}  # for graphs with static lengths
    needed = [node for node in needed_for([mask]) if node.op != "placeholder"]
    found = {text for node in needed for text in _parameters(node, lengths)}
    return str(sorted(found)) if found else ""


def _parameters(node: Node, lengths: set[int]) -> list[str]:
    """Return the numbers in an operator on values, without 0, 1 and infinities."""
    if node.op == "get_attr":
        assert node.graph.owning_module is not None
        value = attribute(node.graph.owning_module, node)
        values: Sequence[Any] = [value.item()] if isinstance(value, Tensor) and value.numel() == 1 else []
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet_of(node) in BANDS:
        values = node.args[1:]
    else:
        values = node.args if packet_of(node) in (aten.full, aten.scalar_tensor) else []
    return [f"{packet_of(node)} {value}" for value in values if _is_parameter(value) and value not in lengths]


def _is_parameter(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) not in (0, 1) and abs(value) < SMALLEST_HIDDEN
