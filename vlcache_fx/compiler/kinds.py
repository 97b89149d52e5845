"""The kinds of graphs: one list for the backend and for explanations, so that they cannot disagree.

A traced graph goes through capture, clean-up and ``classify``; its kind then compiles or explains it. To add
a kind, write a file with a class that has the methods of ``Kind``, and put the class into ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

from vlcache_fx.compiler.cross_attention import CrossAttention
from vlcache_fx.compiler.decode_step import DecodeStep
from vlcache_fx.compiler.encoder import Encoder
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.merge import Merge
from vlcache_fx.compiler.prefill import Prefill
from vlcache_fx.compiler.refused import Refused
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.compiling import compiling
from vlcache_fx.errors import LoweringError, PassError, Reason, UnsupportedGraphError

Result = TypeVar("Result")


class Classified(Protocol):
    """A graph whose kind is known.

    Attributes:
        name: of the kind, as explanations have it.
    """

    @property
    def name(self) -> str: ...

    def compile(self, engine: Engine) -> Compiled:
        """The callable that serves the captured graph's inputs.

        Raises:
            UnsupportedGraphError: the graph turns out to be unsupported.
            PassError, LoweringError: a program cannot be made or does not compile.
        """

    def explain(self) -> GraphExplanation:
        """What ``compile`` would do, without compiling. Raises what ``compile`` raises, but LoweringError."""


class Kind(Classified, Protocol):
    """A kind of graph with reuse."""

    @classmethod
    def match(cls, graph: Traced) -> Self | None:
        """``graph`` with what analysis found, or None where it is of another kind.

        Raises:
            UnsupportedGraphError: nothing in the graph can be reused.
        """


KINDS: tuple[type[Kind], ...] = (Encoder, Merge, CrossAttention, Prefill)
"""The kinds with reuse, in the order in which they are tried. A graph that they refuse is a ``DecodeStep`` or
``Refused``."""


def classify(graph: Traced) -> Kind:
    """Capture and clean up ``graph``, and find its kind.

    Raises:
        UnsupportedGraphError: it is of no kind with reuse, for the reason given.
        PassError: a clean-up pass failed.
    """
    matches = (kind.match(graph) for kind in KINDS)
    return next(found for found in matches if found is not None)  # the last kind refuses all others


def without_reuse(graph: Traced, refusal: UnsupportedGraphError) -> Classified:
    """The kind of a graph that is refused. A decoding step has nothing to reuse, whatever was found first."""
    return DecodeStep(graph, refusal) if graph.is_decode_step else Refused(graph, refusal)


def on_kind(graph: Traced, step: Callable[[Classified], Result]) -> Result:
    """``step`` of the graph's kind; where that is refused or fails, of what is left to the graph."""
    with compiling():
        try:
            return step(classify(graph))
        except UnsupportedGraphError as refusal:
            left = without_reuse(graph, refusal)
        except (PassError, LoweringError) as failure:  # ours to fix, but no reason to fail the user's call
            left = Refused(graph, UnsupportedGraphError(Reason.LOWERING_FAILED, str(failure)))
        return step(left)


def compile_traced(graph: Traced, engine: Engine) -> Compiled:
    """A callable of the traced graph's inputs, with reuse where its kind has any.

    Raises:
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    return graph.entry(on_kind(graph, lambda kind: kind.compile(engine)))
