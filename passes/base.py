"""What a pass is: requires, excludes, run, ensures.

Properties say what holds of a program's graph:

===================  ===============================================================================
``facts``            analysis is finished (no pass ensures it)
``attention_fused``  attention that was written out is a call
``lookups``          the donor table of each stored tensor is in the graph
``spliced``          stored and computed rows are joined
``hoisted``          donor tables are inputs
``recorded``         what donors store is among the results
``rows_restricted``  layers compute their active rows
``kv_only``          a row's last layer computes its keys and values only
``segments``         each node has the segment in which it is compiled; nodes are not added any more
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
    """A graph under rewriting, with the inputs and outputs that passes added to it.

    Attributes:
        graph_module: changed in place by the passes.
        facts: analysis of this very graph (its nodes, not a copy's), or None while only clean-up passes run.
            Of a decoding step, the layers alone.
        writes: what the traced code writes to its inputs, in order.
        row_inputs: per level 0..L, the placeholder with the active rows (int64 [n], or [batch, n] where the
            program computes several samples), or None where all tokens are active.
            Level i is what enters layer i, level L what leaves the last one.
        slots: placeholder of every input that passes added, in input order after the graph's own.
        recorded: what the outputs that passes appended are, in order.
        in_place: indices of inputs that the program writes to by itself, which must be contiguous.
        properties: what the passes that ran ensure; a pass may require some.
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
        """The facts of a prompt's graph; a pass that uses them lists ``facts`` under ``requires``."""
        assert isinstance(self.facts, DecoderFacts)
        return self.facts

    @property
    def layered(self) -> DecoderFacts | DecodeStepFacts:
        """The facts, of which only ``sites`` and ``stream`` are needed."""
        assert self.facts is not None
        return self.facts

    @property
    def held_properties(self) -> set[str]:
        """The properties that hold, ``facts`` included."""
        return self.properties | ({"facts"} if self.facts is not None else set())

    def check_complete(self) -> None:
        """Raise LoweringError unless the program can be lowered."""
        needed = {"segments", "inputs_declared"} | (
            {"hoisted"} if "lookups" in self.held_properties else set()
        )
        missing = sorted(needed - self.held_properties)
        if missing:
            raise LoweringError(f"no pass of the program ensured {', '.join(missing)}")

    @property
    def is_batched(self) -> bool:
        """True where the program computes several samples, each with rows of its own."""
        return self.decoder.batch_dims is not None

    def add_input(self, slot: InputSlot) -> Node:
        """A new placeholder after all others (the existing one when the slot exists already)."""
        if slot not in self.slots:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self.slots[slot] = self.graph.placeholder(str(slot).replace(".", "_"))
        return self.slots[slot]

    def add_outputs(self, named: Iterable[tuple[StoredSlot, Node]]) -> None:
        """Append results after the graph's own."""
        output = self.graph.output_node()
        named = list(named)
        results = output.args[0]
        assert isinstance(results, tuple | list)
        output.args = ((*results, *(node for _, node in named)),)
        self.recorded.extend(slot for slot, _ in named)


class Pass(abc.ABC):
    """One rewrite. A subclass lives in a file of its name and holds no state but its configuration.

    A pass that adds nodes runs before ``tag_segments``, unless it tags them itself and excludes nothing.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Properties that must hold before."""
    excludes: ClassVar[frozenset[str]] = frozenset({"segments"})
    """Properties that must not hold yet."""
    ensures: ClassVar[frozenset[str]] = frozenset()
    """Properties that hold afterwards."""

    @abc.abstractmethod
    def run(self, program: Program) -> bool:
        """Change the program in place; True where something was changed."""

    def fingerprint(self) -> str:
        """Identifies code and configuration of a user's pass; part of the keys of donors (option ``passes``).

        Made of the source of its classes and of its ``repr``. Override it where results depend on more.
        """
        classes = [kind for kind in type(self).__mro__ if issubclass(kind, Pass) and kind is not Pass]
        text = repr((self.name, repr(self), [_source(kind) for kind in classes]))
        return hashlib.sha256(text.encode()).hexdigest()


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed at a prompt: nothing is shared with another process
        return f"{kind.__qualname__} at {id(kind)} of process {os.getpid()}"
