"""The interface of passes, and the program that they rewrite.

Properties of a program's graph:

===================  ===============================================================================
``facts``            analysis is finished (no pass ensures it)
``attention_fused``  attention of separate operators is a single call
``lookups``          the donor table of each stored tensor is in the graph
``spliced``          stored and computed rows are joined to full tensors
``hoisted``          donor tables are inputs
``unpacked``         the program takes one packed donor and unpacks it
``fitted``           donor rows are fitted to recomputed rows
``recorded``         the tensors that donors store are results
``rows_restricted``  layers compute their active rows
``kv_only``          a row's last layer computes only its keys and values
``segments``         each node has a segment; no nodes are added after this
``inputs_declared``  each input has sizes in one shape environment
===================  ===============================================================================
"""

import abc
import hashlib
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts, DecodeStepFacts
from vlcache_fx.errors import LoweringError
from vlcache_fx.ir import Write
from vlcache_fx.spec.slots import InputSlot, StoredSlot

aten = torch.ops.aten


@dataclass
class Program:
    """A graph that passes rewrite, with the inputs and outputs that they add.

    Attributes:
        graph_module: the graph; passes change it in place.
        facts: analysis of this graph (of these nodes, not of a copy), or None in the clean-up pipeline. For a
            decoding step, facts about the layers only.
        writes: input mutations of the traced code, in order.
        row_inputs: per level 0..L, the placeholder with the active rows (int64 [n], or [batch, n] where the
            program computes several samples), or None where all tokens are active. Level i is the input of
            layer i, level L the output of the last layer.
        slots: placeholders of the inputs that passes added, in input order after the graph's own.
        recorded: slots of the outputs that passes appended, in order.
        in_place: indices of inputs that the program writes to itself; they must be contiguous.
        properties: properties that the passes so far ensure.
    """

    graph_module: fx.GraphModule
    facts: DecoderFacts | DecodeStepFacts | None = None
    writes: tuple[Write, ...] = ()
    row_inputs: tuple[Node | None, ...] = ()
    slots: dict[InputSlot, Node] = field(default_factory=dict)
    recorded: list[StoredSlot] = field(default_factory=list)
    in_place: list[int] = field(default_factory=list)
    properties: set[str] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """The graph of ``graph_module``."""
        return self.graph_module.graph

    @property
    def decoder(self) -> DecoderFacts:
        """The facts of a prefill; a pass that reads them lists ``facts`` in ``requires``."""
        assert isinstance(self.facts, DecoderFacts)
        return self.facts

    @property
    def layered(self) -> DecoderFacts | DecodeStepFacts:
        """The facts of a prefill or decoding step: ``sites`` and ``stream``."""
        assert self.facts is not None
        return self.facts

    @property
    def held_properties(self) -> set[str]:
        """The properties of the graph, ``facts`` included."""
        return self.properties | ({"facts"} if self.facts is not None else set())

    def check_complete(self) -> None:
        """Raise LoweringError unless the program can be lowered."""
        held = self.held_properties
        needed = {"segments", "inputs_declared"} | ({"hoisted"} if "lookups" in held else set())
        missing = sorted(needed - held)
        if missing:
            raise LoweringError(f"no pass of the program ensures {', '.join(missing)}")

    @property
    def is_batched(self) -> bool:
        """True where the program computes several samples, each with rows of its own."""
        return self.decoder.batch_dims is not None

    def add_input(self, slot: InputSlot, value: torch.Tensor | None = None) -> Node:
        """Return the placeholder of ``slot``; a new one is inserted after all others.

        Args:
            slot: the slot.
            value: its fake value, for inputs that are added after ``declare_inputs``.
        """
        if slot not in self.slots:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self.slots[slot] = self.graph.placeholder(str(slot).replace(".", "_"))
        if value is not None:
            self.slots[slot].meta["val"] = value
        return self.slots[slot]

    def add_outputs(self, named: Iterable[tuple[StoredSlot, Node]]) -> None:
        """Append nodes to the graph's results, and their slots to ``recorded``."""
        output = self.graph.output_node()
        named = list(named)
        results = output.args[0]
        assert isinstance(results, tuple | list)
        output.args = ((*results, *(node for _, node in named)),)
        self.recorded.extend(slot for slot, _ in named)


class Pass(abc.ABC):
    """A rewrite of a graph. A subclass is in a file of its name and has no state besides its configuration.

    A pass that adds nodes runs before ``tag_segments``, unless it tags them itself and excludes nothing.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Properties that must hold before the pass."""
    excludes: ClassVar[frozenset[str]] = frozenset({"segments"})
    """Properties that must not hold before the pass."""
    ensures: ClassVar[frozenset[str]] = frozenset()
    """Properties that hold after the pass."""

    @abc.abstractmethod
    def run(self, program: Program) -> bool:
        """Change the program in place; return True if anything changed."""

    def fingerprint(self) -> str:
        """Return a digest of the code and configuration of a user's pass, for the keys of donors.

        Covers the source of its classes and its ``repr``. Override it where results depend on more.
        """
        classes = [kind for kind in type(self).__mro__ if issubclass(kind, Pass) and kind is not Pass]
        text = repr((self.name, repr(self), [_source(kind) for kind in classes]))
        return hashlib.sha256(text.encode()).hexdigest()


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # no source, as in an interactive session: valid in this process only
        return f"{kind.__qualname__} at {id(kind)} of process {os.getpid()}"
