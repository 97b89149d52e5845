"""Write rows to the caller's tensors in the graph, in place of returning them."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.ir.dataflow import data_users
from vlcache_fx.ir.scatters import scattered_rows
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten
IN_PLACE: dict[Any, Any] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
}


class WriteInPlace(Pass):
    """A key-value cache of fixed size is written where it lies, in the layer that reads it.

    In a functional graph each layer makes a copy of its cache to write rows to it, and returns the rows,
    which are written to the cache itself in the end. The results that told the rows and their places become
    None. What else is written, such as a counter, stays a result, and so do rows that the graph does not
    read. A program that failed midway may be run again, or another one in its place: it writes to the same
    places, and none reads what they held.
    """

    name: ClassVar[str] = "write_in_place"

    def run(self, program: Program) -> bool:
        """Rewrite every write of rows that nothing else depends on."""
        placeholders = program.graph.find_nodes(op="placeholder")
        output = program.graph.output_node()
        results: Any = output.args[0]
        results, found = list(results), []
        for write in program.writes:
            if write.positions is None or results[write.value] is None:
                continue
            told = (results[write.value], write.dim, results[write.positions])
            scatter = _only_reader(placeholders[write.input])
            if scatter is None or scattered_rows(scatter) != told or output in scatter.users:
                continue
            scatter.target = IN_PLACE[scatter.target]
            results[write.value] = results[write.positions] = None
            found.append(write.input)
        output.args = (tuple(results),)
        program.in_place += found
        return bool(found)


def _only_reader(target: Node) -> Node | None:
    """What alone reads an input's values; None where there is none or several, or they are not contiguous."""
    readers = list(data_users(target))
    return readers[0] if len(readers) == 1 and target.meta["val"].is_contiguous() else None


def first_copy(program: Program) -> Node | None:
    """What makes a copy of an input to write rows to it, if anything does."""
    scatters = (node for node in program.graph.nodes if node.target in IN_PLACE)
    return next((node for node in scatters if node.args[0].op == "placeholder"), None)
