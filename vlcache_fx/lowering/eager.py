"""The eager lowering: run the graph with the kernels of the unmodified model. Reference for the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from vlcache_fx.compiling import compiling
from vlcache_fx.ir.copies import copy_module
from vlcache_fx.runtime.programs.lowered import Lowered, resolved

__all__ = ["EagerLowering"]


class EagerLowering:
    """Lowering to Python code that calls one operator per node."""

    name = "eager"

    def lower(self, program: GraphModule, *, name: str) -> Lowered:
        """See ``Lowering.lower``. Code from ``torch.fx`` frees intermediate results after their last use."""
        with compiling():  # torch.fx counts names of generated code for all threads
            return self._lower(program, name)

    def _lower(self, program: GraphModule, name: str) -> Lowered:
        class_name = f"Eager_{''.join(c if c.isalnum() else '_' for c in name)}"
        module = copy_module(program, class_name=class_name)

        def run(args: Sequence[Any]) -> tuple[Any, ...]:
            with torch.no_grad():
                result = module(*map(resolved, args))
            return tuple(result) if isinstance(result, (tuple, list)) else (result,)

        return run
