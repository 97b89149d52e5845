"""Flex attention: its ``score_mod`` and ``mask_mod`` read as scale, cap, biases and masks."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from vlcache_fx.analysis.attention.scores import (
    NonCanonicalAttentionError,
    Scores,
    Term,
    number_of,
    scores_of,
)
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import attribute, packet_of
from vlcache_fx.ir.sizes import equal

aten = torch.ops.aten

FLEX = torch.ops.higher_order.flex_attention
ALWAYS = frozenset({aten.new_ones, aten.ones, aten.ones_like})


@dataclass(frozen=True)
class Function:
    """Graph of a ``score_mod`` or ``mask_mod``, and the values that it captures.

    Attributes:
        module: (score,) sample, head, query position, key position, ``*reads`` -> one value.
        reads: captured values: nodes of the calling graph, and numbers.
    """

    module: GraphModule
    reads: tuple[Any, ...]

    @property
    def result(self) -> Any:
        """The output of the graph."""
        returned = self.module.graph.output_node().args[0]
        return returned[0] if isinstance(returned, tuple | list) and len(returned) == 1 else returned


@dataclass(frozen=True)
class FlexAttention:
    """A call of flex attention.

    Attributes:
        node: the call, which returns a tuple.
        results: the ``getitem`` nodes of its first result, [batch, heads, rows, value dim].
        query, key, value: operands; keys and values may have fewer heads.
        scale: factor of the scores, before the cap.
        softcap: bound of the scores' magnitude, or None.
        score: its ``score_mod``; ``terms`` are nodes of that graph.
        terms: biases and masks in ``score``, first to last.
        mask: its ``mask_mod``; None if everything is visible.
        is_causal: ``mask`` shows the keys up to the query's position, and no other.
    """

    node: Node
    results: tuple[Node, ...]
    query: Node
    key: Node
    value: Node
    scale: float
    softcap: float | None
    score: Function
    terms: tuple[Term, ...]
    mask: Function | None
    is_causal: bool


def flex_attention(node: Node) -> FlexAttention:
    """Read the call ``node``.

    Raises:
        NonCanonicalAttentionError: it is more than scale, cap, biases and masks.
    """
    query, key, value, score_module, block_mask, scale = node.args[:6]
    reads, mask_reads = (tuple(values) for values in (*node.args[7:9], (), ())[:2])  # type: ignore[arg-type]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    assert isinstance(block_mask, tuple | list)
    parts = {user: user.args[1] for user in node.users if user.target is operator.getitem}
    if any(user not in parts or (parts[user] != 0 and user.users) for user in node.users):
        raise NonCanonicalAttentionError("its log-sum-exp is read too")
    _check_heads(query, key, value)
    score, mask = Function(_module(score_module), reads), Function(_module(block_mask[-1]), mask_reads)
    entering = next(input_ for input_ in score.module.graph.nodes if input_.op == "placeholder")
    found = scores_of(score.result, lambda node: Scores(node) if node is entering else None)
    if found is None:
        raise NonCanonicalAttentionError("its score_mod does not keep the score")
    number = number_of(scale)
    if number is None:
        raise NonCanonicalAttentionError("its scale is not a constant")
    always = isinstance(mask.result, Node) and packet_of(mask.result) in ALWAYS
    return FlexAttention(
        node,
        tuple(user for user in parts if parts[user] == 0),
        query,
        key,
        value,
        number * found.scale,
        found.softcap,
        score,
        found.terms,
        None if always else mask,
        _is_causal(mask),
    )


def _module(value: Any) -> GraphModule:
    found = attribute(value.graph.owning_module, value)
    assert isinstance(found, GraphModule)
    return found


def _check_heads(query: Node, key: Node, value: Node) -> None:
    shapes = [shape_of(operand) for operand in (query, key, value)]
    heads, key_heads, value_heads = (shape[1] for shape in shapes)
    if not all(isinstance(size, int) for size in (heads, key_heads, value_heads)):
        raise NonCanonicalAttentionError("the number of its heads is not fixed")
    same = equal(shapes[0][0], shapes[1][0]) and equal(shapes[1][0], shapes[2][0])
    if not same or key_heads != value_heads or heads % key_heads:
        raise NonCanonicalAttentionError("its queries, keys and values differ in samples or heads")


def _is_causal(mask: Function) -> bool:
    inputs = [node for node in mask.module.graph.nodes if node.op == "placeholder"]
    result = mask.result
    if not isinstance(result, Node) or packet_of(result) not in (aten.le, aten.ge):
        return False
    compared = [_without_zero(operand) for operand in result.args]
    return compared == ([inputs[3], inputs[2]] if packet_of(result) is aten.le else [inputs[2], inputs[3]])


def _without_zero(value: Any) -> Any:
    while isinstance(value, Node) and packet_of(value) is aten.add and value.args[1:] == (0,):
        value = value.args[0]
    return value
