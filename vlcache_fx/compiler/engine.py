"""The engine of models that are compiled in this process: serving and lowering."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from vlcache_fx.compiler.compile_clock import CompileClock, compile_line
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.errors import NoCompilerError, Reason, UnsupportedGraphError
from vlcache_fx.lowering import (
    CompileCache,
    Decompositions,
    EagerLowering,
    InductorLowering,
    Lowered,
    Lowering,
    TensorRtLowering,
)
from vlcache_fx.ops import (
    decompose_attend,
    decompose_attention,
    decompose_causal_conv1d,
    decompose_linear,
    fit_rows_reference,
    scatter_rows_reference,
    splice_rows_reference,
    take_rows_reference,
)
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.state import log


class Engine(ServingEngine):
    """A serving engine that also lowers programs. Safe to share between threads.

    Args:
        options: checked options.

    Attributes:
        lowering: the lowering of the option; ``eager`` after Inductor was found to lack a compiler.
        compile_cache: the code that Inductor compiled.
        explanations: the graphs of a dry run, in the order in which they were traced.
        model: class of the compiled model, for the log; empty where several models may share the engine.

    Raises:
        OptionError, PolicyError: an option names something that does not exist.
    """

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.compile_cache = CompileCache({"config_patches": self.options.inductor_config})
        self.lowering = _lowering(self.options, self.compile_cache)
        self.explanations: list[GraphExplanation] = []
        self.model = ""

    def stats(self) -> dict[str, Any]:
        """See ``ServingEngine.stats``."""
        compiled = self.compile_cache.stats
        counts = {"compilations": len(compiled.compilations), "compile_seconds": round(compiled.seconds, 3)}
        return super().stats() | counts

    @property
    def num_compilations(self) -> int:
        """See ``ServingState``."""
        return len(self.compile_cache.stats.compilations)

    def _may_wait(self) -> bool:
        from torch._dynamo.convert_frame import compile_lock

        # Whoever holds the lock must not wait: others may need it to compile what they compute.
        return super()._may_wait() and not compile_lock._is_owned()  # type: ignore[attr-defined]

    def lower(self, program: fx.GraphModule, *, name: str, clock: CompileClock | None = None) -> Lowered:
        """Lower a program, and log what was compiled; with eager kernels if Inductor lacks a compiler.

        Args:
            program: the program.
            name: its name in logs and errors.
            clock: times of earlier steps.

        Raises:
            LoweringError: see ``Lowering.lower``.
            UnsupportedGraphError: NO_COMPILER, in strict mode.
        """
        with self.logging_compilation(name, clock):
            try:
                return self.lowering.lower(program, name=name)
            except NoCompilerError as error:
                self.continue_without_compiler(error)
                return self.lowering.lower(program, name=name)

    @contextmanager
    def logging_compilation(self, name: str, clock: CompileClock | None = None) -> Iterator[None]:
        """Measure the body as the lowering of a program; log a line if it returns."""
        clock, before = clock or CompileClock(), self.compile_cache.stats.counts
        with clock.measure("lowering"):
            yield
        segments = self.compile_cache.stats.since(before) if self.lowering.name == "inductor" else ""
        log.info("%s", compile_line(name, self.model, self.lowering.name, clock, segments))

    def continue_without_compiler(self, error: NoCompilerError) -> None:
        """Use eager kernels from now on, with reuse. Log it once, or raise in strict mode."""
        refusal = UnsupportedGraphError(Reason.NO_COMPILER, str(error))
        if self.options.strict:
            raise refusal from error
        with self._lock:
            is_new = self.lowering.name != EagerLowering.name
            if is_new:
                self.lowering = EagerLowering()
                self.refusals.append(refusal)
        if is_new:
            log.warning("vlcache: running with eager kernels: %s", error)


def _lowering(options: Options, compile_cache: CompileCache) -> Lowering:
    match options.lowering:
        case "eager":
            return EagerLowering()
        case "tensorrt":
            return TensorRtLowering()
    decompositions: Decompositions = {
        torch.ops.vlcache.splice_rows.default: splice_rows_reference,
        torch.ops.vlcache.fit_rows.default: fit_rows_reference,
        torch.ops.vlcache.scatter_rows.default: scatter_rows_reference,
        torch.ops.vlcache.take_rows.default: take_rows_reference,
        torch.ops.aten.scaled_dot_product_attention.default: decompose_attention,
        torch.ops.aten.linear.default: decompose_linear,
        torch.ops.vlcache.attend.default: decompose_attend,
        torch.ops.vlcache.causal_conv1d.default: decompose_causal_conv1d,
    }
    return InductorLowering(compile_cache, decompositions=decompositions)
