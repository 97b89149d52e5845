"""A decoding step: a graph in which one new token attends to a KV cache.

All decoder-only models have one, and their ``generate()`` calls it for every token after the prefill. It has
no rows to reuse. It is compiled layer by layer, each distinct layer once, and writes to the cache in place. A
step without recognizable layers is compiled as a whole. Nothing is logged or reported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from vlcache_fx.compiler.builders.runners import decode_step_runner
from vlcache_fx.compiler.compile_clock import CompileClock
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.errors import LoweringError, PassError, UnsupportedGraphError
from vlcache_fx.passes.standard import decode_step_program

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodeStep:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        refusal: the reason why no kind with reuse matched.
    """

    name: ClassVar[str] = "decoding step"
    graph: Traced
    refusal: UnsupportedGraphError

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``."""
        unmodified = self.graph.unmodified
        if engine.lowering.name != "inductor":
            return unmodified.prepare(engine)
        try:
            captured = self.graph.captured
            clock = CompileClock(self.graph.clock)
            with clock.measure("passes"):
                program = decode_step_program(captured, self.graph.pipelines.decode)
            clock.num_layers = len(program.layered.sites)
            runner = decode_step_runner(captured, program, engine, unmodified, clock)
        except (UnsupportedGraphError, PassError, LoweringError) as failure:
            _log.debug("vlcache: compiling a decoding step as a whole: %s", failure)
            return unmodified.prepare(engine)
        return self.graph.rewritten(runner)

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        return GraphExplanation(self.name, str(self.refusal), reason_code=self.refusal.reason)
