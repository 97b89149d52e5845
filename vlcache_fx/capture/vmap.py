"""Replace ``torch.vmap`` in a Dynamo graph by operators on whole tensors.

Dynamo writes a vmapped function (often one that computes a mask) as calls that open and close functorch's
levels, with the function's operators between them. Pre-dispatch tracing cannot resolve these levels, so each
such region is traced below them, with functorch's own batching rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

OPEN, CLOSE = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting


def inline_vmap(module: fx.GraphModule) -> bool:
    """Replace every vmapped region of ``module``, whose nodes have ``example_value``; return True for any.

    Raises:
        Exception: any type; functorch cannot batch an operator.
    """
    regions = _regions(module.graph)
    for region in regions:
        _replace(module, region)
    if regions:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return bool(regions)


def _regions(graph: fx.Graph) -> list[list[Node]]:
    """Return the nodes of each region, from the opening of the outermost level to its close."""
    regions: list[list[Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is OPEN:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        if node.target is CLOSE:
            depth -= 1
    return regions


@contextmanager
def _restored_state(values: Sequence[Any]) -> Iterator[None]:
    """Allow real constants among fake ``values``; close all levels after a failure.

    A level that stayed open would apply to every later trace.
    """
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    allowed = mode is not None and mode.allow_non_fake_inputs
    try:
        if mode is not None:
            mode.allow_non_fake_inputs = True
        yield
    finally:
        if mode is not None:
            mode.allow_non_fake_inputs = allowed
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _replace(module: fx.GraphModule, region: Sequence[Node]) -> None:
    inside = set(region)
    inputs = list(dict.fromkeys(p for node in region for p in node.all_input_nodes if p not in inside))
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    values = [node.meta.get("example_value", node.meta.get("val")) for node in inputs]
    with torch.no_grad(), _restored_state(values):
        traced = make_fx(fx.GraphModule(module, graph), _allow_non_fake_inputs=True)(*values)
    outer = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with module.graph.inserting_before(region[0]):
        for node in traced.graph.nodes:
            if node.op == "output":
                results = node.args[0]
            elif node.op == "get_attr":
                name = f"_vmap_constant{len(list(module.buffers()))}"
                module.register_buffer(name, getattr(traced, str(node.target)))
                outer[node] = module.graph.get_attr(name)
            elif node.op != "placeholder":
                outer[node] = module.graph.node_copy(node, outer.__getitem__)
                outer[node].meta["example_value"] = node.meta.get("val")
    for old, new in zip(outputs, results, strict=True):
        old.replace_all_uses_with(outer[new], delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        module.graph.erase_node(node)
