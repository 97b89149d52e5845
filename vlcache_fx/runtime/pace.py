"""How long computations take, estimated from earlier ones."""

from __future__ import annotations


class Pace:
    """Moving estimate of the time of a computation, in seconds for each unit of work.

    Safe to share between threads: of two updates at once, one may be lost.

    Args:
        share: weight of the latest computation.
    """

    def __init__(self, share: float = 0.3) -> None:
        self._share = share
        self._seconds_per_unit: float | None = None

    def add(self, units: int, elapsed_s: float) -> None:
        """Add a computation that compiled nothing."""
        latest, before = elapsed_s / max(units, 1), self._seconds_per_unit
        self._seconds_per_unit = latest if before is None else before + self._share * (latest - before)

    def seconds(self, units: int) -> float | None:
        """Return the estimated time of a computation; None before the first."""
        return None if self._seconds_per_unit is None else self._seconds_per_unit * units

    def cost_ms(self, units: int, share: float = 1.0) -> float | None:
        """Return the estimated milliseconds of a ``share`` of a computation; None before the first."""
        seconds = self.seconds(units)
        return None if seconds is None else 1e3 * share * seconds
