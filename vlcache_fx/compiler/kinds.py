"""The kinds of graphs: one list for the backend and for explanations, so that they agree.

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
    """A classified graph.

    Attributes:
        name: name of the kind, as in explanations.
    """

    @property
    def name(self) -> str: ...

    def compile(self, engine: Engine) -> Compiled:
        """Return a callable that takes the captured graph's inputs.

        Raises:
            UnsupportedGraphError: the graph is unsupported after all.
            PassError, LoweringError: a pass or the lowering failed.
        """

    def explain(self) -> GraphExplanation:
        """Explain what ``compile`` would do. Raises what ``compile`` raises, except LoweringError."""


class Kind(Classified, Protocol):
    """A kind of graph with reuse."""

    @classmethod
    def match(cls, graph: Traced) -> Self | None:
        """Return the classified graph; None if it is of another kind.

        Raises:
            UnsupportedGraphError: nothing in the graph can be reused.
        """


KINDS: tuple[type[Kind], ...] = (Encoder, Merge, CrossAttention, Prefill)
"""The kinds with reuse, in the order of trial. A refused graph is a ``DecodeStep`` or ``Refused``."""


def classify(graph: Traced) -> Kind:
    """Capture and clean up ``graph``, and find its kind.

    Raises:
        UnsupportedGraphError: the graph is of no kind with reuse.
        PassError: a clean-up pass failed.
    """
    graph.ensure_captured()
    with graph.clock.measure("analysis"):
        matches = (kind.match(graph) for kind in KINDS)
        return next(found for found in matches if found is not None)  # the last kind refuses all others


def without_reuse(graph: Traced, refusal: UnsupportedGraphError) -> Classified:
    """Return the kind of a refused graph: a decoding step, or refused for ``refusal``."""
    return DecodeStep(graph, refusal) if graph.is_decode_step else Refused(graph, refusal)


def on_kind(graph: Traced, step: Callable[[Classified], Result]) -> Result:
    """Classify the graph and apply ``step``; after a refusal or failure, apply it to a kind without reuse."""
    with compiling():
        try:
            return step(classify(graph))
        except UnsupportedGraphError as refusal:
            fallback = without_reuse(graph, refusal)
        except (PassError, LoweringError) as failure:  # our bug must not fail the user's call
            fallback = Refused(graph, UnsupportedGraphError(Reason.LOWERING_FAILED, str(failure)))
        return step(fallback)


def compile_traced(graph: Traced, engine: Engine) -> Compiled:
    """Return a callable that takes the traced graph's inputs, with reuse if its kind has any.

    Raises:
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    return graph.entry(on_kind(graph, lambda kind: kind.compile(engine)))
