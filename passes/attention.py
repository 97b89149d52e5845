"""What passes share about attention calls, and nodes that know their value and where they come from."""

import contextlib
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vlcache_fx.analysis.sites import ATTEND, Site


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
    node.meta = {name: origin.meta[name] for name in ("stack_trace",) if name in origin.meta}
    given, named = map_arg((args, kwargs), lambda one: one.meta["val"])
    mode = next(
        value.fake_mode
        for value in (one.meta["val"] for one in (*node.all_input_nodes, origin))
        if isinstance(value, FakeTensor)
    )
    # The sizes belong to whoever traced the graph: nothing may be assumed about them here.
    with torch.no_grad(), mode, enable_python_dispatcher(), _without_guards(mode.shape_env):
        node.meta["val"] = target(*given, **named)
    return node


def _without_guards(shape_env: Any) -> Any:
    return contextlib.nullcontext() if shape_env is None else shape_env.suppress_guards()
