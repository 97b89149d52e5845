"""Settings of a stress run, as plain data that travels to worker processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from vlcache_fx.errors import OptionError

TOLERANCE = 1e-5
"""Largest accepted difference of logits in float32, as in ``tests/test_invariants.py``."""


@dataclass(frozen=True)
class FaultRates:
    """Chances of faults inside the store, each per call, in [0, 1].

    Attributes:
        read_error: ``get`` fails with EIO.
        write_error: ``put`` fails with ENOSPC.
        allocation: ``get`` or ``put`` fails for lack of memory.
        timeout: ``get`` or ``put`` waits for ``timeout_s`` seconds, then fails.
        late_damage: ``get`` returns an entry whose bytes prove damaged when they are used.
        timeout_s: seconds of a timeout.
    """

    read_error: float = 0.01
    write_error: float = 0.01
    allocation: float = 0.01
    timeout: float = 0.002
    late_damage: float = 0.01
    timeout_s: float = 0.05

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise OptionError(f"{name}={value} is not valid: it must be a number in [0, 1]")


@dataclass(frozen=True)
class StressSettings:
    """What runs, for how long, and what is disturbed.

    Attributes:
        stores: URLs of the tiers, fastest first.
        folder: folder of the file tier, on which faults are injected from outside; empty without one.
        ledger: file in which the digests of stored entries are noted.
        seconds: duration.
        processes, threads: worker processes, and threads of each.
        seed: seed of requests and faults.
        models: names of the models, see ``requests.MODELS``.
        capacity_bytes: bound of tiers without one in their URL.
        full_share: share of requests with ``policy="full"``.
        clear_share: share of requests before which entries are cleared.
        reopen_share: share of requests before which the store is closed and opened again.
        rates: faults inside the store.
        folder_fault_s: mean seconds between two faults on the folder; 0 for none.
        in_place: also change files in place, under the eyes of those that read them.
        kill_s: seconds between two kills of a worker; 0 for none.
        tolerance: largest accepted difference of logits.

    Raises:
        OptionError: a value is not valid.
    """

    stores: tuple[str, ...]
    folder: str = ""
    ledger: str = ""
    seconds: float = 60.0
    processes: int = 2
    threads: int = 4
    seed: int = 0
    models: tuple[str, ...] = ("tiny", "llava")
    capacity_bytes: int = 1 << 20
    full_share: float = 0.6
    clear_share: float = 0.01
    reopen_share: float = 0.005
    rates: FaultRates = field(default_factory=FaultRates)
    folder_fault_s: float = 0.1
    in_place: bool = True
    kill_s: float = 12.0
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in ("processes", "threads", "capacity_bytes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is not valid: it must be a positive integer")
        if self.seconds <= 0:
            raise OptionError(f"seconds={self.seconds} is not valid: it must be positive")
        if not self.stores:
            raise OptionError("stores=() is not valid: it must name at least one store URL")

    @classmethod
    def from_json(cls, text: str) -> StressSettings:
        """Return the settings that ``as_json`` wrote."""
        given = json.loads(text)
        for name in ("stores", "models"):
            given[name] = tuple(given[name])
        return cls(**given | {"rates": FaultRates(**given["rates"])})

    def as_json(self) -> str:
        """Return the settings as one line of JSON."""
        return json.dumps(asdict(self))
