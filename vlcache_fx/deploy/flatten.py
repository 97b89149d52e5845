"""A program as a module for ``torch.export``: weights as buffers, inputs of equal names merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.spec.slots import InputSlot, Keep, Positions, Rows, Source

aten = torch.ops.aten
TAIL = "tail"

CHECKS = frozenset(
    {
        aten._assert_async.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Assertions of the model. ONNX has no operator for them; the session checks inputs instead."""


@dataclass(frozen=True)
class FlatGraph:
    """A graph of named tensors.

    Attributes:
        module: inputs in order -> outputs in order.
        inputs: name -> index of the program's input.
        outputs: names.
        results: per result of the program, the name of its output; None for a constant.
    """

    module: fx.GraphModule
    inputs: Mapping[str, int]
    outputs: tuple[str, ...]
    results: tuple[str | None, ...]


def flatten(
    program: fx.GraphModule,
    inputs: Sequence[str | None],
    weights: Mapping[int, tuple[str, Tensor]],
    results: Sequence[str],
    replacements: Mapping[Any, Callable[..., Any]],
) -> FlatGraph:
    """Copy a program with its weights as buffers.

    Args:
        program: flat graph whose inputs are all placeholders; unchanged.
        inputs: name of each placeholder; equal names become one input. None for weights, and for the index of
            a gather that changes nothing.
        weights: index of a placeholder -> name and tensor.
        results: name of each result; a tensor that is returned twice gets the first name.
        replacements: operator -> replacement function.
    """
    root = torch.nn.Module()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    named: dict[str, fx.Node] = {}
    used: dict[str, int] = {}
    idle: set[fx.Node] = set()
    placeholders = program.graph.find_nodes(op="placeholder")
    for index, node in enumerate(placeholders):
        if index in weights:
            root.register_buffer(f"weight_{index}", weights[index][1].detach())
            copies[node] = graph.get_attr(f"weight_{index}")
        elif inputs[index] is None:
            idle.add(node)
        elif node.users:
            name = str(inputs[index])
            if name not in named:
                named[name], used[name] = graph.placeholder(f"input_{index}"), index
            copies[node] = named[name]
    output = program.graph.output_node()
    returned: Any = output.args[0]
    for node in program.graph.nodes:
        if node.op == "placeholder" or node is output or node.target in CHECKS:
            continue
        is_identity = node.target is aten.index_select.default and node.args[2] in idle
        copies[node] = copies[node.args[0]] if is_identity else graph.node_copy(node, copies.__getitem__)
        if copies[node].target in replacements:
            copies[node].target = replacements[copies[node].target]
    output_names: dict[fx.Node, str] = {}
    for value, name in zip(returned, results, strict=True):
        if isinstance(value, fx.Node):
            output_names.setdefault(value, name)
    graph.output(tuple(copies[value] for value in output_names))
    _move_placeholders_first(graph)
    for node in graph.find_nodes(op="get_attr"):
        if not str(node.target).startswith("weight_"):
            root.register_buffer(str(node.target), getattr(program, str(node.target)))
    graph.eliminate_dead_code()
    module = fx.GraphModule(root, graph)
    result_names = tuple(
        output_names.get(value) if isinstance(value, fx.Node) else None for value in returned
    )
    return FlatGraph(module, used, tuple(output_names.values()), result_names)


def _move_placeholders_first(graph: fx.Graph) -> None:
    """Move placeholders before all other nodes; keep their order."""
    for node in reversed(list(graph.find_nodes(op="placeholder"))):
        first = next(iter(graph.nodes))
        if node is not first:
            first.prepend(node)


def group_of(level: int, groups: Sequence[int]) -> str:
    """Return the group of a level of rows: a number, or ``tail`` after the last layer."""
    ends = list(accumulate(groups))
    return next((str(number) for number, end in enumerate(ends) if level < end), TAIL)


def slot_name(slot: InputSlot, groups: Sequence[int]) -> str | None:
    """Name an input that passes added; levels of a group share it. None for a gather that changes nothing.

    Args:
        slot: the program's slot.
        groups: number of layers in each group of consecutive layers that compute the same rows.
    """
    match slot:
        case Rows(level) | Source(level):
            return f"{slot.kind}.{group_of(level, groups)}"
        case Keep(level):
            made_at, read_at = level, level + 1
        case Positions(made_at, read_at):
            pass
        case _:
            return str(slot)
    before, after = group_of(made_at, groups), group_of(read_at, groups)
    return None if before == after else f"{slot.kind}.{before}.{after}"
