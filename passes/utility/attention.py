"""What passes share about attention calls, and nodes that know their value and where they come from."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from vlcache_fx.analysis.attention.sites import ATTEND, SDPA, Site
from vlcache_fx.passes.base import Program

aten = torch.ops.aten

MOVES = frozenset(
    {aten.transpose.int, aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.slice.Tensor}
)


def is_grouped_by_writing_out(target: Any, value: Any, mask: Any) -> bool:
    """True where grouped heads would cost more than repeated ones.

    On CUDA the fused kernels that take a mask take as many key heads as heads; with fewer, PyTorch falls back
    to one that writes all scores out.
    """
    return target is SDPA and mask is not None and bool(value.device.type == "cuda")


def write_site(site: Site) -> None:
    """Let the call of ``site`` read what ``site`` says."""
    operands = (site.query, site.key, site.value, site.mask)
    if site.node.target is ATTEND:
        site.node.args = (
            *operands, site.sinks, site.is_causal, site.scale, site.softcap, site.enable_gqa,
        )  # fmt: skip
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


def insert_call(graph: Graph, target: Any, *args: Any, origin: Node, **kwargs: Any) -> Node:
    """A call at the graph's insertion point, with its fake value, from the source line of ``origin``."""
    node = graph.call_function(target, args, kwargs)
    node.meta = _place_of(origin)
    given, named = map_arg((args, kwargs), lambda one: one.meta["val"])
    mode = fake_mode([one.meta["val"] for one in (*node.all_input_nodes, origin)])
    # The sizes belong to whoever traced the graph: nothing may be assumed about them here.
    with torch.no_grad(), mode, enable_python_dispatcher(), without_guards(mode.shape_env):
        node.meta["val"] = target(*given, **named)
    return node


def insert_size(graph: Graph, size: Any, origin: Node) -> Any:
    """A size that stays what it is when rows are restricted: a number, or a node at the insertion point.

    It is read from the first node that has it, which lies before or at the beginning of the residual stream.
    """
    if isinstance(size, int):
        return size
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) == str(size):
            return node
        dims = value.shape if isinstance(value, torch.Tensor) else ()
        for dim, one in enumerate(dims):
            if str(one) == str(size):
                return insert_call(graph, aten.sym_size.int, node, dim, origin=origin)
    raise ValueError(f"no node has the size {size}")


def fake_mode(values: Any) -> Any:
    """The mode of the first fake tensor among ``values``, however nested."""
    return next(value.fake_mode for value in tree_leaves(values) if isinstance(value, FakeTensor))


def without_guards(shape_env: Any) -> Any:
    """Within it, nothing is assumed about sizes of ``shape_env`` (if there is one)."""
    return contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()


def _place_of(origin: Node) -> dict[str, Any]:
    return {name: origin.meta[name] for name in ("stack_trace",) if name in origin.meta}


def insert_graph(program: Program, module: GraphModule, given: Sequence[Any], origin: Node) -> list[Node]:
    """The nodes of ``module`` at the graph's insertion point, reading ``given``; its results."""
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
            copies[node].meta = {**known, **_place_of(origin)}
    returned = module.graph.output_node().args[0]
    results = returned if isinstance(returned, tuple | list) else (returned,)
    return [copies[node] for node in results if isinstance(node, Node)]


def loosen_views(result: Node) -> None:
    """Let views of ``result`` copy where they have to: a call may lay out its result in another way."""
    todo, seen = [result], {result}
    while todo:
        for user in todo.pop().users:
            if user.target in (aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            elif user.target in MOVES and user not in seen:
                seen.add(user)
                todo.append(user)
