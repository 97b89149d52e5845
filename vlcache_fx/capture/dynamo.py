"""Dynamo's GraphModule as the IR.

Torch functionalises, decomposes to pre-dispatch ATen and propagates fakes (``make_fx``, and
``torch._functorch.aot_autograd.aot_export_module`` for graphs with mutations). This module folds in module
floats, which Dynamo passes as 0-d tensors, classifies inputs by their source, and turns input mutations into
results (``writes``).
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
    """Return a Dynamo graph as the IR; ``graph_module`` is not changed.

    Args:
        graph_module: the graph that Dynamo passes to a backend; placeholders have ``example_value``.
        example_inputs: the real inputs of the compiled call.

    Raises:
        UnsupportedGraphError: MUTATED_INPUTS, see ``split_writes``; CAPTURE_FAILED, torch cannot trace the
            graph; NO_ATTENTION, it has no floating-point tensor.
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
    except Exception as error:  # torch raises many types here; callers need not tell them apart
        raise UnsupportedGraphError(
            Reason.CAPTURE_FAILED, f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    exported.graph.lint()
    return Captured(exported, data_where_written(kinds, writes), specialised, writes)


def functionalised(module: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, tuple[Write, ...]]:
    """Return the functional graph and its input mutations, which become results.

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
    """Return ``kinds`` with DATA for mutated inputs: such a buffer may differ from request to request."""
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
    """Return True if no value is a floating-point tensor, as in graphs that compute masks."""
    values = [node.meta["example_value"] for node in graph.nodes if "example_value" in node.meta]
    leaves = [leaf for value in values for leaf in (value if isinstance(value, tuple | list) else (value,))]
    floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return bool(leaves) and not floats


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
    """Replace ``input.item()`` of 0-d inputs by the number: module floats are such with dynamic=True."""
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
