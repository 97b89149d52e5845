"""A traced graph in its three forms: as traced, captured in the IR, and unmodified."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.capture.decode_step import attends, is_decode_step
from vlcache_fx.capture.wrapped import Unwrapped
from vlcache_fx.compiler.unmodified import Compiled, DynamoGraph, Rewrapped, Unmodified
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.passes import Program
from vlcache_fx.passes.configured import Pipelines
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients

STANDARD = Pipelines()


class Traced:
    """One graph that Dynamo or ``torch.export`` traced.

    Args:
        capture: returns the graph in the IR; called once, when ``captured`` is first read.
        unmodified: the graph without reuse.
        is_decode_step: True for a decoding step that Dynamo traced.
        unwrapped: inner tensors of inputs that are tensor subclasses; the captured graph takes these.
        pipelines: the passes for the graph.
        input_names: names of the captured graph's inputs in the traced code; empty where unknown.

    Attributes:
        clock: times of the steps that come before programs: ``capture``, ``analysis``, ``passes``.
    """

    def __init__(
        self,
        capture: Callable[[], Captured],
        unmodified: Unmodified,
        *,
        is_decode_step: bool = False,
        unwrapped: Unwrapped | None = None,
        pipelines: Pipelines = STANDARD,
        input_names: Sequence[str] = (),
    ) -> None:
        self._input_names = tuple(input_names)
        self.unmodified, self.is_decode_step, self.pipelines = unmodified, is_decode_step, pipelines
        self._capture, self._unwrapped = capture, unwrapped
        self._outcome: Captured | UnsupportedGraphError | None = None
        self.clock = Clock()

    @classmethod
    def by_dynamo(
        cls, graph_module: fx.GraphModule, example_inputs: Sequence[Any], pipelines: Pipelines = STANDARD
    ) -> Traced:
        """Return the traced graph for the arguments of a Dynamo backend."""
        plain = DynamoGraph(graph_module, example_inputs)
        try:
            unwrapped = Unwrapped.of(graph_module, example_inputs)
        except UnsupportedGraphError as error:
            return cls(_raising(error), plain, pipelines=pipelines)
        is_step = is_decode_step(graph_module.graph)
        if unwrapped is None:
            return cls(
                lambda: _capture(graph_module, example_inputs),
                plain,
                is_decode_step=is_step,
                pipelines=pipelines,
                input_names=[node.name for node in graph_module.graph.nodes if node.op == "placeholder"],
            )
        return cls(
            lambda: _capture_unwrapped(unwrapped),
            Rewrapped(plain, unwrapped),
            is_decode_step=is_step,
            unwrapped=unwrapped,
            pipelines=pipelines,
        )

    @property
    def captured(self) -> Captured:
        """The graph in the IR, cleaned up.

        Raises:
            UnsupportedGraphError: capture failed; the same error in each read.
            PassError: a clean-up pass failed.
        """
        if self._outcome is None:
            try:
                with self.clock.measure("capture"):
                    captured = self._capture()
            except UnsupportedGraphError as error:
                self._outcome = error
            else:
                with self.clock.measure("passes"):
                    self.pipelines.cleanup.run(Program(captured.graph_module))
                self._outcome = captured
        if isinstance(self._outcome, UnsupportedGraphError):
            raise self._outcome
        return self._outcome

    def ensure_captured(self) -> None:
        """Capture the graph; raises what ``captured`` raises."""
        _ = self.captured

    @property
    def input_names(self) -> dict[str, str]:
        """Names of weights in the traced code, by their names in the captured graph."""
        if len(self._input_names) != len(self.captured.placeholders):
            return {}
        found = zip(self.captured.placeholders, self.captured.kinds, self._input_names, strict=True)
        return {node.name: _readable(name) for node, kind, name in found if kind is InputKind.WEIGHT}

    def rewritten(self, compiled: Compiled) -> Compiled:
        """Return ``compiled``, with the unmodified graph for calls outside its specialization."""
        self.unmodified.release()
        captured, unmodified = self.captured, self.unmodified
        if not captured.specialised:
            return compiled
        return lambda *args: compiled(*args) if captured.holds_for(args) else unmodified(*args)

    def entry(self, compiled: Compiled) -> Compiled:
        """Wrap ``compiled``, which takes the captured graph's inputs, to take the traced graph's inputs."""
        unwrapped = self._unwrapped
        return compiled if unwrapped is None else lambda *args: compiled(*unwrapped.flat(args))


def _capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    if records_gradients(example_inputs):
        if attends(graph_module.graph):
            raise gradient_refusal()
        raise UnsupportedGraphError(Reason.NO_ATTENTION, "nothing to reuse, with gradients or without")
    return capture_dynamo(graph_module, example_inputs)


def _capture_unwrapped(unwrapped: Unwrapped) -> Captured:
    try:
        return _capture(unwrapped.graph_module, unwrapped.example_inputs)
    except UnsupportedGraphError as refusal:
        if refusal.reason is not Reason.CAPTURE_FAILED:
            raise
        detail = f"weights of the class {unwrapped.classes} cannot be traced: {refusal.detail}"
        raise UnsupportedGraphError(refusal.reason, detail) from refusal


def _raising(error: UnsupportedGraphError) -> Callable[[], Captured]:
    def capture() -> Captured:
        raise error

    return capture


def _readable(name: str) -> str:
    """Return Dynamo's name of a weight without its words for modules and parameters."""
    short = re.sub(r"_?(modules|parameters|buffers)_", ".", re.sub(r"^l_(\w*?_)?self_", "", name))
    return short.strip("._").replace("..", ".")
