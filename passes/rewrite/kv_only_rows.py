"""Compute only keys and values of a row in its last layer."""

from typing import ClassVar

from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import stream_dim
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.restrict_rows import keep_input
from vlcache_fx.passes.rewrite.rows import gather, restrict_node


class KvOnlyRows(Pass):
    """Moves each residual cut from the end of its layer to the inputs of the layer's q part.

    Layer i needs keys and values for the rows R_i, and everything else only for the rows R_{i+1}: query,
    attention and MLP of the other rows are dead.
    """

    name: ClassVar[str] = "kv_only_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"kv_only"})

    def run(self, program: Program) -> bool:
        """Rewrite every layer that ends in a cut."""
        cuts = {node.meta["cuts_layer"]: node for node in program.graph.nodes if "cuts_layer" in node.meta}
        for index, cut in cuts.items():
            boundary = program.decoder.stream.boundaries[index + 1]
            cut.replace_all_uses_with(boundary, delete_user_cb=lambda user, cut=cut: user is not cut)
            program.graph.erase_node(cut)
            _restrict_q_part(program, index)
        return bool(cuts)


def _restrict_q_part(program: Program, index: int) -> None:
    facts = program.decoder
    layer, segment = facts.layers[index], f"layer.{index}"
    rows, rows_after = program.row_inputs[index : index + 2]
    assert rows_after is not None
    keep = keep_input(program, index, rows)
    kept: dict[Node, Node] = {}
    for node in facts.stream.members[index]:
        if node not in layer.q_part:
            continue
        for operand in node.all_input_nodes:
            if layer.site is not None and node is layer.site.node and operand is not node.args[0]:
                continue
            if _enters(operand, layer.kv_part, facts.stream.boundaries[index]):
                if operand not in kept:
                    source = operand.meta.get("gathers", (operand,))[0]
                    axis = facts.flows[source].dim if source in facts.flows else stream_dim(source)
                    kept[operand] = gather(program, operand, axis, keep, node, segment)
                node.replace_input_with(operand, kept[operand])
        restrict_node(program, node, facts.flows[node], rows_after, layer.site, segment)


def _enters(operand: Node, kv_part: dict[Node, None], entering: Node) -> bool:
    """Return True for operands with the layer's rows: kv nodes, the residual, or gathers of them."""
    gathered = operand.meta.get("gathers", (None,))[0]
    return operand in kv_part or operand is entering or gathered is entering or gathered in kv_part
