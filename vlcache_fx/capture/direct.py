"""Pre-dispatch ATen of a graph without mutations, in one trace.

``aot_export_module`` traces a graph twice and wraps every tensor, to find and undo mutations. Decoders rarely
have any; then a plain trace gives the same operators in a fraction of the time.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import _should_decompose_because_unsafe_op
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def trace_without_writes(module: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule | None:
    """Return the graph that ``aot_export_module`` would return; None if the graph mutates tensors.

    Args:
        module: Dynamo's graph.
        fakes: its inputs: fake tensors of one mode, and sizes.
    """
    mode = next((value.fake_mode for value in fakes if isinstance(value, FakeTensor)), None)
    if mode is None:
        return None
    with torch.no_grad(), mode, enable_python_dispatcher(), fx.traceback.preserve_node_meta():
        traced = make_fx(fx.Interpreter(module).run, decomposition_table=_table(), pre_dispatch=True)(*fakes)
    operators = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    written = any(isinstance(target, OpOverload) and target._schema.is_mutable for target in operators)
    return None if written or any(node.op == "call_module" for node in traced.graph.nodes) else traced


@functools.cache
def _table() -> dict[OpOverload, Any]:
    """Return the decompositions of composites that may alias their inputs (``reshape``, ``to``).

    Others, attention included, are not decomposed, as in torch's own pre-dispatch export.
    """
    # Values do not depend on whether a tensor is detached in place.
    found: dict[OpOverload, Any] = {aten.detach_.default: aten.detach.default}
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"):
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        operator = getattr(getattr(aten, packet, None), overload or "default", None)
        if namespace == "aten" and isinstance(operator, OpOverload) and _is_decomposed(operator):
            found[operator] = operator.decompose
    return found


def _is_decomposed(operator: OpOverload) -> bool:
    if operator._schema.is_mutable:
        return False
    aliases = any(argument.alias_info for argument in operator._schema.arguments)
    return aliases or _should_decompose_because_unsafe_op(operator)
