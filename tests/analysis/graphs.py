"""Hand-written graphs, captured for analysis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from vlcache_fx.ir import Captured
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

CALL = tiny_vlm_inputs(3, 2, [(5, 0)])


class Of(nn.Module):
    """A function as a module; keyword-only arguments are its attributes."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.names = list(parts)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, **call: Any) -> Any:
        return self.function(**call, **{name: getattr(self, name) for name in self.names})


def capture(
    function: Callable[..., Any], call: dict[str, Any], dynamic: bool | None = None, **parts: Any
) -> Captured:
    return captured_graph(Of(function, **parts), call, dynamic=dynamic)[0]


@functools.cache  # analysis changes nothing in it
def captured_vlm(dynamic: bool | None = None, **options: Any) -> Captured:
    return captured_graph(tiny_vlm(**options), CALL, dynamic=dynamic)[0]


def attend(x: Tensor, **options: Any) -> Tensor:
    """One head of width 4 without projections."""
    heads = x[:, None]
    result: Tensor = nn.functional.scaled_dot_product_attention(
        heads, heads, heads, **{"is_causal": True, **options}
    )
    return result[:, 0]


def node_of(captured: Captured, target: str, index: int = 0) -> Node:
    found = [node for node in captured.graph_module.graph.nodes if str(node.target) == target]
    return found[index]
