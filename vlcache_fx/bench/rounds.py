"""Times several systems in turn: disturbances of the machine affect all of them."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from vlcache_fx.errors import VlcacheError


class MeasurementError(VlcacheError):
    """A run had another mode than expected: its time is meaningless."""


def do_nothing() -> None:
    """Default of all callbacks."""


@dataclass(frozen=True)
class System:
    """A function to time.

    Attributes:
        run: the timed function.
        prepare: called before every run, not timed.
        check: called after every run, not timed; raises if the run had another mode than expected.
        rounds: number of rounds; None for all.
        synchronize: waits for the device; called before the clock starts and before it stops.
    """

    run: Callable[[], object]
    prepare: Callable[[], None] = do_nothing
    check: Callable[[], None] = do_nothing
    rounds: int | None = None
    synchronize: Callable[[], None] = do_nothing


@dataclass(frozen=True)
class Summary:
    """Median and range of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Summarise at least one value."""
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        """Format the summary, such as ``3.54 (3.03 to 4.50)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def milliseconds(self, digits: int = 0) -> str:
        """Format seconds, such as ``1,948 ms (1,803 to 2,240)``."""
        middle, low, high = (f"{1e3 * value:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{middle} ms ({low} to {high})"


def time_once(system: System) -> float:
    """Prepare, run and check ``system`` once; return the seconds of the run."""
    system.prepare()
    gc.collect()
    system.synchronize()
    start = time.perf_counter()
    result = system.run()
    system.synchronize()
    seconds = time.perf_counter() - start
    del result
    system.check()
    return seconds


def median_seconds(
    run: Callable[[], object], repeats: int = 5, synchronize: Callable[[], None] = do_nothing
) -> float:
    """Return the median seconds of ``repeats`` runs, after one warm-up run."""
    return median(_repeated(run, repeats, synchronize))


def fastest_seconds(
    run: Callable[[], object],
    repeats: int,
    synchronize: Callable[[], None] = do_nothing,
    limit_s: float = math.inf,
) -> float:
    """Return the minimum seconds of ``repeats`` runs, after one warm-up run.

    Args:
        run: what is timed.
        repeats: number of runs.
        synchronize: waits for the device.
        limit_s: after so many seconds no further run begins.
    """
    return min(_repeated(run, repeats, synchronize, limit_s))


def _repeated(
    run: Callable[[], object], repeats: int, synchronize: Callable[[], None], limit_s: float = math.inf
) -> list[float]:
    system = System(run, synchronize=synchronize)
    time_once(system)
    end_s, found = time.monotonic() + limit_s, [time_once(system)]
    while len(found) < repeats and time.monotonic() < end_s:
        found.append(time_once(system))
    return found


def interleave(
    systems: Mapping[str, System], rounds: int, after_run: Callable[[], None] = do_nothing
) -> dict[str, list[float]]:
    """Time every system once per round, in the given order; return seconds per system and round."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for name, system in systems.items():
            if system.rounds is None or number < system.rounds:
                seconds[name].append(time_once(system))
                after_run()
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Summary:
    """Summarise the ratios within each round; only rounds of both systems count."""
    return Summary.of([above / below for above, below in zip(numerator, denominator, strict=False)])
