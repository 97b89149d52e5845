"""What a pass is: requires, run, ensures."""

import abc
import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts, StepFacts
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
    facts: DecoderFacts | StepFacts | None = None
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
    def layered(self) -> DecoderFacts | StepFacts:
        """The facts, of which only ``sites`` and ``stream`` are needed."""
        assert self.facts is not None
        return self.facts

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
    """One rewrite. A subclass lives in a file of its name and holds no state but its configuration."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Properties that must hold before; ``facts`` stands for a finished analysis."""
    ensures: ClassVar[frozenset[str]] = frozenset()
    """Properties that hold afterwards."""

    @abc.abstractmethod
    def run(self, program: Program) -> bool:
        """Change the program in place; True where something was changed."""

    @classmethod
    def fingerprint(cls) -> str:
        """Identifies the pass's code; part of the key of everything compiled behind it."""
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
