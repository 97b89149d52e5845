"""One program of a decoder graph, lowered when first used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.compiling import compiling
from vlcache_fx.errors import LoweringError, Reason, UnsupportedGraphError
from vlcache_fx.lowering import Arriving, CudaGraphs, Lowered
from vlcache_fx.passes import Program
from vlcache_fx.plan.stack import StackedPlan
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.programs.bind import Tables, bind
from vlcache_fx.spec.slots import InputSlot, StoredSlot


class ProgramRunner:
    """A cold or warm program and what it takes to call it.

    Args:
        name: ``cold`` or ``warm``; appears in logs.
        slots: the inputs that passes added, in order, after the graph's own.
        recorded: the results that passes appended, in order.
        lower: makes it callable; raises LoweringError where it cannot.
        device: where the program's inputs live.
        engine: takes a refusal.
        in_place: indices of the graph's inputs that it writes to by itself.
    """

    def __init__(
        self,
        name: str,
        slots: Sequence[InputSlot],
        recorded: Sequence[StoredSlot],
        lower: Callable[[], Lowered],
        device: torch.device,
        engine: Engine,
        in_place: Sequence[int] = (),
    ) -> None:
        self.name, self.recorded, self.slots = name, tuple(recorded), tuple(slots)
        self.in_place = tuple(in_place)
        self._lower, self._device, self._engine = lower, device, engine
        self._lowered: Lowered | None = None
        self._failed = False

    @classmethod
    def of(cls, name: str, program: Program, device: torch.device, engine: Engine) -> "ProgramRunner":
        """Of a rewritten graph, lowered as the engine's options say.

        Raises:
            LoweringError: passes are missing that lowerings need.
        """
        program.check_complete()

        def lower() -> Lowered:
            lowered = engine.lower(program.graph_module, name=name)
            is_recorded = name == "warm" and device.type == "cuda" and engine.options.cuda_graphs
            return CudaGraphs(lowered, in_place=program.in_place) if is_recorded else lowered

        return cls(name, tuple(program.slots), program.recorded, lower, device, engine, program.in_place)

    def ready(self) -> bool:
        """Lower the program if it is not yet; False where it does not compile (said once, as a refusal)."""
        if self._lowered is None and not self._failed:
            with compiling():
                self._lower_once()
        return not self._failed

    def _lower_once(self) -> None:
        if self._lowered is not None or self._failed:  # another thread was here first
            return
        try:
            self._lowered = self._lower()
        except LoweringError as error:
            self._failed = True
            self._engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, str(error)))

    def bind(
        self,
        plan: Plan | StackedPlan,
        positions: Tensor | None,
        tables: Tables,
    ) -> list[Tensor | Arriving]:
        """The values of the inputs that passes added, on the program's device: see ``bind.bind``."""
        on_device: dict[int, tuple[Tensor, Tensor]] = {}  # with the source, so that no other takes its id

        def send(tensor: Tensor) -> Tensor:
            if self._device.type == "cpu":
                return tensor
            if id(tensor) not in on_device:  # levels share tensors
                on_device[id(tensor)] = tensor, tensor.to(self._device, non_blocking=True)
            return on_device[id(tensor)][1]

        return bind(self.slots, plan, positions, tables, send)

    def run(self, args: Sequence[Any], bound: Sequence[Tensor | Arriving]) -> Sequence[Any] | None:
        """Run the program on the graph's inputs and the bound ones; call ``ready`` first.

        Returns:
            The results, or None where the program failed: it is refused then, and not tried again. Nothing of
            the failed run matters: rows that it wrote to a cache are written by whatever runs in its place.
        """
        assert self._lowered is not None
        try:
            return self._lowered([*args, *bound])
        except Exception as error:
            if self._engine.options.strict:
                raise
            self._failed = True
            detail = f"the {self.name} program failed: {type(error).__name__}: {error}"
            self._engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, detail))
            return None
