"""Run each layer on its active rows only."""

from typing import ClassVar

from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import gather, restrict_node
from vlcache_fx.spec.slots import Keep


class RestrictRows(Pass):
    """Layer i computes rows R_i; the residual is cut to R_{i+1} where it leaves the layer.

    Everything in a decoder layer but attention works token by token, so this is exact for the rows that stay.
    Levels whose entry in ``row_inputs`` is None keep all tokens.
    """

    name: ClassVar[str] = "restrict_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"rows_restricted"})

    def run(self, program: Program) -> bool:
        """Gather the embeddings, restrict each layer's kv and q parts, cut the residual behind each layer."""
        facts = program.decoder
        axis = facts.tail_rows.axis
        start = facts.stream.boundaries[0]
        if program.row_inputs[0] is not None:
            readers = [user for user in start.users if user in facts.stream.nodes]
            cut = gather(program, start, axis, program.row_inputs[0], readers[0], "prelude")
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
    """Behind layer ``index``: rows R_{index+1} of its result, by their places among R_index."""
    boundary = program.decoder.stream.boundaries[index + 1]
    readers = list(boundary.users)
    if not readers:
        return
    after = boundary.next
    cut = gather(
        program,
        boundary,
        program.decoder.tail_rows.axis,
        keep_input(program, index, rows),
        after,
        f"layer.{index}",
    )
    cut.meta["cuts_layer"] = index
    _redirect(boundary, cut, readers)


def keep_input(program: Program, index: int, rows: Node | None) -> Node:
    """Places of R_{index+1} among R_index: an input, or the rows themselves where R_index is every token."""
    rows_after = program.row_inputs[index + 1]
    assert rows_after is not None
    return rows_after if rows is None else program.add_input(Keep(index))


def _redirect(source: Node, target: Node, readers: list[Node]) -> None:
    for reader in readers:
        if reader is not target:
            reader.replace_input_with(source, target)
