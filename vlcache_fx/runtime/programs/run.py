"""Runs one program of a decoder graph; lowers it when first used."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import LoweringError, Reason, StoreError, UnsupportedGraphError
from vlcache_fx.plan.stack import StackedPlan
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.programs.bind import Tables, bind
from vlcache_fx.runtime.programs.lowered import Lowered, PendingTensor, ProgramInterruptedError
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.program import ProgramSpec


class ProgramRunner:
    """A cold or warm program, or the variant of a warm one for a packed donor.

    Args:
        name: ``cold``, ``warm`` or ``packed``; appears in logs.
        spec: spec of its inputs and results.
        lower: returns the lowered program, the same in every call; may raise LoweringError.
        device: device of the program's inputs.
        engine: receives refusals.
    """

    def __init__(
        self,
        name: str,
        spec: ProgramSpec,
        lower: Callable[[], Lowered],
        device: torch.device,
        engine: ServingState,
    ) -> None:
        self.name, self.spec = name, spec
        self._lower, self._device, self._engine = lower, device, engine
        self._lowered: Lowered | None = None
        self._failed = False
        self._lock = threading.Lock()

    def ready(self) -> bool:
        """Lower the program if needed; return False if that failed (refused once)."""
        if self._lowered is None and not self._failed:
            try:
                self._lowered = self._lower()
            except LoweringError as error:
                self._fail(str(error))
        return not self._failed

    def _fail(self, detail: str) -> None:
        with self._lock:
            is_first, self._failed = not self._failed, True
        if is_first:
            self._engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, detail))

    def bind(
        self,
        plan: Plan | StackedPlan,
        positions: Tensor | None,
        tables: Tables,
    ) -> list[Tensor | PendingTensor]:
        """Return the values of the inputs that passes added, on the program's device; see ``bind.bind``."""
        on_device: dict[int, tuple[Tensor, Tensor]] = {}  # with the source, which keeps its id taken

        def send(tensor: Tensor) -> Tensor:
            if self._device.type == "cpu":
                return tensor
            if id(tensor) not in on_device:  # levels share tensors
                on_device[id(tensor)] = tensor, tensor.to(self._device, non_blocking=True)
            return on_device[id(tensor)][1]

        return bind(self.spec.slots, plan, positions, tables, send)

    def run(self, args: Sequence[Any], bound: Sequence[Tensor | PendingTensor]) -> Sequence[Any] | None:
        """Run the program on the graph's inputs and the bound ones; call ``ready`` first.

        Returns:
            The results, or None if the program failed; it is then refused and not tried again. Rows that it
            wrote to a cache are overwritten by the program that runs instead.

        Raises:
            StoreError: a donor did not arrive as it was stored. That is no fault of the program, which stays.
            ProgramInterruptedError: see ``between_steps``.
        """
        assert self._lowered is not None
        try:
            return self._lowered([*args, *bound])
        except (StoreError, ProgramInterruptedError):
            raise
        except Exception as error:
            if self._engine.options.strict:
                raise
            self._fail(f"the {self.name} program failed: {type(error).__name__}: {error}")
            return None
