"""Compute only the active rows of each layer."""

from typing import ClassVar

from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import stream_dim
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import gather, restrict_node
from vlcache_fx.spec.slots import Keep


class RestrictRows(Pass):
    """Restricts layer i to the rows R_i, and its output to R_{i+1}.

    Decoder layers work token by token except in attention, so the remaining rows are exact. Levels with None
    in ``row_inputs`` keep all tokens.
    """

    name: ClassVar[str] = "restrict_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"rows_restricted"})

    def run(self, program: Program) -> bool:
        """Gather the embeddings, restrict each layer's kv and q parts, cut the residual after each layer."""
        facts = program.decoder
        start = facts.stream.boundaries[0]
        if program.row_inputs[0] is not None:
            readers = [user for user in start.users if user in facts.stream.nodes]
            cut = gather(program, start, stream_dim(start), program.row_inputs[0], readers[0], "prelude")
            _redirect(start, cut, readers)
        for index, (layer, members) in enumerate(zip(facts.layers, facts.stream.members, strict=True)):
            rows, rows_after = program.row_inputs[index : index + 2]
            if rows is not None:
                for node in members:
                    if node not in layer.full_part:
                        restrict_node(program, node, facts.flows[node], rows, layer.site, f"layer.{index}")
            if rows_after is not None:
                _cut_residual(program, index, rows)
        return any(rows is not None for rows in program.row_inputs)


def _cut_residual(program: Program, index: int, rows: Node | None) -> None:
    """Gather the rows R_{index+1} after layer ``index``, by their positions in R_index."""
    boundary = program.decoder.stream.boundaries[index + 1]
    readers = list(boundary.users)
    if not readers:
        return
    after = boundary.next
    cut = gather(
        program,
        boundary,
        stream_dim(boundary),
        keep_input(program, index, rows),
        after,
        f"layer.{index}",
    )
    cut.meta["cuts_layer"] = index
    _redirect(boundary, cut, readers)


def keep_input(program: Program, index: int, rows: Node | None) -> Node:
    """Return the positions of R_{index+1} in R_index: an input, or the rows if R_index is all tokens."""
    rows_after = program.row_inputs[index + 1]
    assert rows_after is not None
    return rows_after if rows is None else program.add_input(Keep(index))


def _redirect(source: Node, target: Node, readers: list[Node]) -> None:
    for reader in readers:
        if reader is not target:
            reader.replace_input_with(source, target)
