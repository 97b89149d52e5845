"""What computing an entry again would cost, measured where it is computed; stores weigh evictions by it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from torch import Tensor


class RunCost:
    """Milliseconds per unit (a token, or a byte of features) of one program's latest run.

    The first run is left out: it may lower, compile, or load the program. On a GPU the times are those of the
    host, which queues work; they order entries of one model, as no store mixes them with times of another
    device.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_run = False
        self._ms_per_unit: float | None = None

    def note(self, elapsed_ms: float, units: int) -> None:
        """Note a run of ``units`` units."""
        with self._lock:
            if self._has_run and units > 0:
                self._ms_per_unit = elapsed_ms / units
            self._has_run = True

    def of(self, units: int) -> float | None:
        """Return the milliseconds of ``units`` units; None before the second run."""
        return None if self._ms_per_unit is None else self._ms_per_unit * units


def nbytes_of(values: Iterable[object]) -> int:
    """Return the bytes of the tensors among ``values``."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
