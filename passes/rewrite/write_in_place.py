"""Write rows to the caller's tensors in the graph instead of returning them."""

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
    """Updates a static KV cache in place, in the layer that reads it.

    In a functional graph, each layer copies its cache to write rows to it, and returns the rows and their
    indices, which are written to the cache after the call. This pass makes the layer's write an in-place
    operator, and the two results None. Other mutations, such as those of a counter, stay results, and so do
    rows that the graph does not read. After a failure, this program or another may run on the same inputs: it
    writes the same indices, and no program reads their old values.
    """

    name: ClassVar[str] = "write_in_place"

    def run(self, program: Program) -> bool:
        """Rewrite every write of rows to an input without other readers."""
        placeholders = program.graph.find_nodes(op="placeholder")
        output = program.graph.output_node()
        results: Any = output.args[0]
        results, found = list(results), []
        for write in program.writes:
            if write.positions is None or results[write.value] is None:
                continue
            expected = (results[write.value], write.dim, results[write.positions])
            scatter = _only_reader(placeholders[write.input])
            if scatter is None or scattered_rows(scatter) != expected or output in scatter.users:
                continue
            scatter.target = IN_PLACE[scatter.target]
            results[write.value] = results[write.positions] = None
            found.append(write.input)
        output.args = (tuple(results),)
        program.in_place += found
        return bool(found)


def _only_reader(target: Node) -> Node | None:
    """Return the only reader of an input's values; None for none or several, or a non-contiguous input."""
    readers = list(data_users(target))
    return readers[0] if len(readers) == 1 and target.meta["val"].is_contiguous() else None


def find_copied_input(program: Program) -> Node | None:
    """Return the first node that copies an input to write rows to it, or None."""
    scatters = (node for node in program.graph.nodes if node.target in IN_PLACE)
    return next((node for node in scatters if node.args[0].op == "placeholder"), None)
