"""Compiles programs of ``torch.export``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from vlcache_fx.capture.exported import bound_tensors, capture_exported, given_arguments
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.kinds import compile_traced
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.options import Options
from vlcache_fx.passes.configured import configured
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients
from vlcache_fx.runtime.report import Report, one_line


def compile_exported(program: ExportedProgram, **options: Any) -> "CompiledProgram":
    """Run an exported language model with reuse: one export with a dynamic length serves all prompts.

    Args:
        program: a model that merges encoder features into its token embeddings, or that takes embeddings
            with marked spans (``mark_spans``). It is not modified; its parameters and buffers are not
            copied.
        **options: see ``Options``; ``dynamic`` has no effect, as the export fixed it.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: with ``strict``, a program that cannot be rewritten.
    """
    return CompiledProgram(program, Engine(Options.parse(options)))


class CompiledProgram:
    """An exported program with reuse; called like the exported module.

    Attributes:
        vlcache: the engine: reports, statistics, other settings.
    """

    def __init__(self, program: ExportedProgram, engine: Engine) -> None:
        self.vlcache = engine
        self._bound = bound_tensors(program)
        self._arguments = _Arguments(program, [tensor is not None for tensor in self._bound])
        pipelines = configured(engine.options)
        # Exported decoding steps are refused like other graphs, not silenced.
        self._run = compile_traced(
            Traced(lambda: capture_exported(program), self._arguments, pipelines=pipelines), engine
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the program's results. For arguments outside its specialization, the program raises."""
        given = self._arguments.given(args, kwargs)
        if given is None:
            return self._arguments.module(*args, **kwargs)
        remaining = iter(given)
        inputs = [next(remaining) if bound is None else bound for bound in self._bound]
        if records_gradients(inputs):
            refusal = gradient_refusal()
            self.vlcache.report(Report("bypass", one_line(str(refusal)), reason_code=refusal.reason))
            return self._arguments.module(*args, **kwargs)
        return self._arguments.results(self._run(*inputs))


class _Arguments:
    """Maps the caller's arguments to inputs of the captured graph; also runs the program without reuse."""

    def __init__(self, program: ExportedProgram, is_bound: Sequence[bool]) -> None:
        self.module = program.module()
        self._in_spec, self._out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        self._is_given = given_arguments(program)
        self._is_bound = is_bound
        placeholders = program.graph.find_nodes(op="placeholder")
        self._fakes = [node.meta["val"] for node in placeholders[-len(self._is_given) :]]
        self._ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}

    def prepare(self, engine: Engine) -> "_Arguments":
        """Do nothing: exported programs run uncompiled."""
        del engine
        return self

    def release(self) -> None:
        """Do nothing."""

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run the program without reuse, given the inputs of the captured graph."""
        given = iter(value for value, is_bound in zip(inputs, self._is_bound, strict=True) if not is_bound)
        leaves = [
            next(given) if is_given else fake
            for fake, is_given in zip(self._fakes, self._is_given, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        results: list[Any] = pytree.tree_leaves(self.module(*args, **kwargs))
        return results

    def given(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
        """Return the inputs among the arguments, in order; None if the program does not accept these."""
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        if spec != self._in_spec:
            return None
        sizes: dict[str, int] = {}
        if not all(self._covers(fake, leaf, sizes) for fake, leaf in zip(self._fakes, leaves, strict=True)):
            return None
        return [leaf for leaf, is_given in zip(leaves, self._is_given, strict=True) if is_given]

    def _covers(self, fake: Any, leaf: Any, sizes: dict[str, int]) -> bool:
        """Return True if ``leaf`` fits the example ``fake``. ``sizes`` has the dynamic sizes so far."""
        if not isinstance(fake, Tensor):
            return isinstance(fake, torch.SymInt) or (type(fake) is type(leaf) and bool(fake == leaf))
        if not isinstance(leaf, Tensor) or (leaf.dtype, leaf.device, leaf.dim()) != (
            fake.dtype, fake.device, fake.dim(),
        ):  # fmt: skip
            return False
        for size, want in zip(leaf.shape, fake.shape, strict=True):
            name, bounds = str(want), self._ranges.get(str(want))
            if isinstance(want, int) and size != want:
                return False
            if bounds is not None and not bounds.lower <= size <= bounds.upper:
                return False
            if bounds is not None and sizes.setdefault(name, size) != size:
                return False
        return True

    def results(self, found: Sequence[Any]) -> Any:
        """Return the program's results, given those of the captured graph."""
        return pytree.tree_unflatten(list(found), self._out_spec)
