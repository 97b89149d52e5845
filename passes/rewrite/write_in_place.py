"""Write rows to the caller's tensors in the graph, in place of returning them."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.capture import Write
from vlcache_fx.capture.writes import scattered_rows
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
    is written, such as a counter, stays a result.
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
        writes = [write for write in program.step.writes if write.places is not None]
        for write in writes:
            _rewrite(program, placeholders[write.input], write)
        return bool(writes)


def _rewrite(program: Program, target: Node, write: Write) -> None:
    output = program.graph.output_node()
    results: Any = list(output.args[0])  # type: ignore[arg-type]
    readers = list(target.users)
    scatter = readers[0] if len(readers) == 1 else None
    told = (results[write.value], write.dim, results[write.places])
    if scatter is None or scattered_rows(scatter) != told:
        raise refuse(Reason.MUTATED_INPUTS, target, "more is done with it than to write rows and read it")
    if not scatter.users or output in scatter.users:
        raise refuse(Reason.MUTATED_INPUTS, target, "it is written to, and nothing in the graph reads it")
    if not target.meta["val"].is_contiguous():
        raise refuse(Reason.MUTATED_INPUTS, target, "it is written to, and not contiguous")
    scatter.target = IN_PLACE[scatter.target]
    results[write.value] = results[write.places] = None
    output.args = (tuple(results),)
