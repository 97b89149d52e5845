"""Insertion of nodes, each with its fake value and the source line of the node that it replaces."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from vlcache_fx.passes.base import Program

aten = torch.ops.aten


def insert_call(graph: Graph, target: Any, *args: Any, origin: Node, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point, with its fake value and the source line of ``origin``."""
    node = graph.call_function(target, args, kwargs)
    node.meta = _source_of(origin)
    given, named = map_arg((args, kwargs), lambda operand: operand.meta["val"])
    mode = fake_mode([operand.meta["val"] for operand in (*node.all_input_nodes, origin)])
    # The sizes belong to the tracer of the graph, which must not get guards from here.
    with torch.no_grad(), mode, enable_python_dispatcher(), suppress_guards(mode.shape_env):
        node.meta["val"] = target(*given, **named)
    return node


def insert_size(graph: Graph, size: Any, origin: Node) -> Any:
    """Return a size as a number, or as a node at the insertion point that row restriction does not change.

    The node reads the first tensor of that size, which is before or at the start of the residual stream.
    """
    if isinstance(size, int):
        return size
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) == str(size):
            return node
        dims = value.shape if isinstance(value, torch.Tensor) else ()
        for dim, found in enumerate(dims):
            if str(found) == str(size):
                return insert_call(graph, aten.sym_size.int, node, dim, origin=origin)
    raise ValueError(f"no node has the size {size}")


def fake_mode(values: Any) -> Any:
    """Return the mode of the first fake tensor in the pytree ``values``."""
    return next(value.fake_mode for value in tree_leaves(values) if isinstance(value, FakeTensor))


def suppress_guards(shape_env: Any) -> Any:
    """Return a context manager in which ``shape_env``, if any, gets no guards."""
    return contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()


def _source_of(origin: Node) -> dict[str, Any]:
    return {name: origin.meta[name] for name in ("stack_trace",) if name in origin.meta}


def insert_graph(program: Program, module: GraphModule, given: Sequence[Any], origin: Node) -> list[Node]:
    """Copy the nodes of ``module`` to the graph's insertion point, with ``given`` as inputs.

    Returns:
        The copies of those results of ``module`` that are nodes.
    """
    copies: dict[Node, Any] = {}
    waiting = iter(given)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(waiting)
        elif node.op == "get_attr":
            name = f"_constant_{len(program.graph.nodes)}"
            program.graph_module.register_buffer(name, getattr(module, str(node.target)), persistent=False)
            copies[node] = program.graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = program.graph.call_function(node.target, args, kwargs)
            known = {"val": node.meta["val"]} if "val" in node.meta else {}
            copies[node].meta = {**known, **_source_of(origin)}
    returned = module.graph.output_node().args[0]
    results = returned if isinstance(returned, tuple | list) else (returned,)
    return [copies[node] for node in results if isinstance(node, Node)]
