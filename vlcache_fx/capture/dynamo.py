"""From the GraphModule that Dynamo hands to a backend to the IR.

Functionalisation, decomposition to pre-dispatch ATen and fake propagation are torch's own (``make_fx``, and
``torch._functorch.aot_autograd.aot_export_module`` for graphs that write to tensors); here are only the two
things they need on the way: module floats that arrive as 0-d tensors are folded in as numbers, and inputs are
classified by their source. What the graph writes to its inputs becomes results (``writes``).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_export_module

from vlcache_fx.capture.direct import trace_without_writes
from vlcache_fx.capture.flex import drop_block_masks, refuse_transforms
from vlcache_fx.capture.mutations import split_writes
from vlcache_fx.capture.vmap import inline_vmap
from vlcache_fx.capture.wrapped import WHOLE
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind, Write
from vlcache_fx.ir.copies import copy_module
from vlcache_fx.ir.scatters import canonicalize_slice_scatters


def capture_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Bring a Dynamo graph to the IR. ``graph_module`` is left as it is.

    Args:
        graph_module: the graph as Dynamo calls a backend with it; placeholders carry ``example_value``.
        example_inputs: the real inputs of the call that is being compiled.

    Raises:
        UnsupportedGraphError: a result is a view of an input that the graph writes to, torch cannot export
            it, or it computes with integers alone, so that there is no attention in it.
    """
    if _has_no_floats(graph_module.graph):
        raise UnsupportedGraphError(Reason.NO_ATTENTION, "the graph has no floating-point tensor")
    module = copy_module(graph_module)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    kinds = tuple(
        _kind(node, node.meta.get(WHOLE, example))
        for node, example in zip(placeholders, example_inputs, strict=True)
    )
    specialised = _fold_numbers(module, placeholders, example_inputs)
    drop_block_masks(module)
    fakes = [_fake(node, example) for node, example in zip(placeholders, example_inputs, strict=True)]
    try:
        inline_vmap(module)
        refuse_transforms(module.graph)
        traced = trace_without_writes(module, fakes)
        exported, writes = (traced, ()) if traced is not None else functionalised(module, fakes)
    except UnsupportedGraphError:
        raise
    except Exception as error:  # torch raises many kinds here; all mean the same to the caller
        raise UnsupportedGraphError(
            Reason.CAPTURE_FAILED, f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    exported.graph.lint()
    return Captured(exported, data_where_written(kinds, writes), specialised, writes)


def functionalised(module: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, tuple[Write, ...]]:
    """By way of functionalisation: writes to tensors of the graph's own are undone, others become results.

    Raises:
        UnsupportedGraphError: MUTATED_INPUTS, see ``split_writes``.
    """
    with torch.no_grad():
        exported, signature = aot_export_module(module, fakes, trace_joint=False, pre_dispatch=True)
    assert isinstance(exported, fx.GraphModule)
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    returned: Any = exported.graph.output_node().args[0]
    if len(returned) != len(mutated) + len(signature.user_outputs):
        raise UnsupportedGraphError(Reason.MUTATED_INPUTS, "one value is written to several inputs")
    inputs = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    targets = [inputs[mutated[value.name]] for value in returned[: len(mutated)]]
    canonicalize_slice_scatters(exported.graph)
    writes = split_writes(exported.graph, targets)
    exported.recompile()
    return exported, writes


def data_where_written(kinds: Sequence[InputKind], writes: Sequence[Write]) -> tuple[InputKind, ...]:
    """A buffer that the graph writes to is not the same tensor in every request."""
    written = {write.input for write in writes}
    return tuple(InputKind.DATA if index in written else kind for index, kind in enumerate(kinds))


def _kind(node: fx.Node, example: Any) -> InputKind:
    if not isinstance(example, torch.Tensor):
        return InputKind.SIZE
    graph_arg = node.meta.get("grapharg")
    source = getattr(graph_arg, "source", None)
    if isinstance(example, torch.nn.Parameter) or (source is not None and _is_module_source(source)):
        return InputKind.WEIGHT
    return InputKind.DATA


def _has_no_floats(graph: fx.Graph) -> bool:
    """True where values are known, and none is a floating-point tensor: masks are made in such graphs."""
    values = [node.meta["example_value"] for node in graph.nodes if "example_value" in node.meta]
    parts = [one for value in values for one in (value if isinstance(value, tuple | list) else (value,))]
    return bool(parts) and not any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in parts)


def _is_module_source(source: Any) -> bool:
    guard_source = source.guard_source
    if callable(guard_source):  # a method before torch 2.12
        guard_source = guard_source()
    return bool(guard_source.is_unspecialized_nn_module() or guard_source.is_specialized_nn_module())


def _fake(node: fx.Node, example: Any) -> Any:
    value = node.meta.get("example_value", node.meta.get("val"))
    return example if value is None else value


def _fold_numbers(
    module: fx.GraphModule, placeholders: list[fx.Node], example_inputs: Sequence[Any]
) -> tuple[tuple[int, Any], ...]:
    """Replace ``input.item()`` of 0-d inputs by the number: what dynamic=True makes of module floats."""
    folded = []
    for index, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not isinstance(example, torch.Tensor) or example.dim() != 0:
            continue
        reads = [user for user in node.users if user.op == "call_method" and user.target == "item"]
        if not reads:
            continue
        value = example.item()
        for read in reads:
            read.replace_all_uses_with(value)  # type: ignore[arg-type]
            module.graph.erase_node(read)
        folded.append((index, value))
    module.recompile()
    return tuple(folded)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
