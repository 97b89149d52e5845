"""Write rows to the caller's tensors in the graph, in place of returning them."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.capture.scatters import scattered_rows
from vlcache_fx.errors import Reason
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten
IN_PLACE: dict[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
}


class WriteInPlace(Pass):
    """A step that decodes writes a row to each key-value cache of fixed size and attends to all of it.

    In a functional graph that makes a copy of every cache in every step. Here the cache is written where it
    lies, in the layer that reads it; the results that told the rows and their places become None. What else
    is written, such as a counter, stays a result, and so do rows that the graph does not read.
    """

    name: ClassVar[str] = "write_in_place"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"written_in_place"})

    def run(self, program: Program) -> bool:
        """Rewrite every write of rows.

        Raises:
            UnsupportedGraphError: MUTATED_INPUTS, where one cannot be done in place.
        """
        placeholders = program.graph.find_nodes(op="placeholder")
        output = program.graph.output_node()
        results: Any = output.args[0]
        results, changed = list(results), False
        for write in program.step.writes:
            target, value = placeholders[write.input], results[write.value]
            if value is None:
                continue  # written in place already
            told = None if write.places is None else (value, write.dim, results[write.places])
            problem = _problem(target, value, told, output)
            if problem is not None:
                raise refuse(Reason.MUTATED_INPUTS, target, problem)
            if write.places is not None and target.users:
                (scatter,) = target.users
                scatter.target = IN_PLACE[scatter.target]
                results[write.value] = results[write.places] = None
                changed = True
        output.args = (tuple(results),)
        return changed


def _problem(target: Node, value: Node, told: object, output: Node) -> str | None:
    """Why what is written to ``target`` can neither be written in place nor stay a result; None if it can.

    Args:
        target: the input.
        value: the rows, or the whole value, that are written.
        told: the rows, their dimension and their places; None for a whole value.
        output: of the graph.
    """
    if told is None:
        base = value
        while base.target in IN_PLACE:
            base = base.args[0]  # type: ignore[assignment]
        return "rows are written to it in a way of their own" if base is target else None
    for reader in target.users:
        if len(target.users) > 1 or scattered_rows(reader) != told or output in reader.users:
            return "more is done with it than to write rows and then to read it"
        if not target.meta["val"].is_contiguous():
            return "rows are written to it, and it is not contiguous"
    return None
