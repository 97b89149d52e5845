"""The systems that the bench of tiers times."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlcache_fx.bench.new_process import from_pixels
from vlcache_fx.bench.page_cache import drop_page_cache
from vlcache_fx.bench.rounds import MeasurementError, System, do_nothing, time_once
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.tier_table import TierRow
from vlcache_fx.bench.workload import Workload

MEMORY = Variant()
COLD, COLD_PIXELS, MEMORY_PIXELS = "cold", "cold, from pixels", "memory, from pixels"
FLUSH_S = 60.0


class TierBench:
    """The systems to time: one model, plain, cold, and warm from each tier.

    Args:
        systems: the compared systems.
        workload: their requests.
        folder: parent of the folders of file tiers.
    """

    def __init__(self, systems: Systems, workload: Workload, folder: Path) -> None:
        self._bench, self._workload, self._folder = systems, workload, folder
        self.systems: dict[str, System] = {}
        self.rows: dict[str, TierRow] = {}
        self.cached_shares: list[float] = []
        self.pixels = from_pixels(systems.plain, workload, 1)[0]

    def add_references(self) -> None:
        """Add the plain model, and cold runs with features and with pixels."""
        bench, request = self._bench, self._workload.second
        self._add("plain", functools.partial(bench.compiled, **request))
        for name, asked in ((COLD, request), (COLD_PIXELS, self.pixels[1])):
            run = functools.partial(bench.reusing, **asked)
            self._add(name, run, bench.prepare_cold, self._checked("cold"))

    def add_tier(self, name: str, variant: Variant, prepare: Callable[[], None] = do_nothing) -> None:
        """Record donors in a tier, and add warm runs from it; ``prepare`` is called before each."""
        self._record(variant, self._workload.first)
        beside = "" if name == "memory" else "memory"
        self._add_warm(name, self._workload.second, variant, prepare, TierRow(name, [], beside, COLD))

    def add_pixels(self) -> None:
        """Add warm runs from memory that get pixels: features are read from the store too."""
        self._record(MEMORY, self.pixels[0])
        row = TierRow(MEMORY_PIXELS, [], "", COLD_PIXELS)
        self._add_warm(MEMORY_PIXELS, self.pixels[1], MEMORY, do_nothing, row)

    def drop_pages(self, variant: Variant) -> None:
        """Drop a file tier's pages from the cache; the store was opened anew and has mapped none."""
        gc.collect()
        folder = Path(variant.store.removeprefix("file://"))
        self.cached_shares.append(1 - drop_page_cache(folder.rglob("*.safetensors")))

    def record(self, variant: Variant, requests: list[dict[str, Any]]) -> None:
        """Record the donors and features of requests."""
        for request in requests:
            self._record(variant, request)

    def _record(self, variant: Variant, request: dict[str, Any]) -> None:
        self._bench.prepare_warm(variant)
        self._bench.reusing(**request)
        if not self._bench.engine.store.flush(FLUSH_S):
            raise MeasurementError(f"{variant.store} did not take the donors within {FLUSH_S:g} s")

    def _add_warm(
        self,
        name: str,
        request: dict[str, Any],
        variant: Variant,
        prepare: Callable[[], None],
        row: TierRow,
    ) -> None:
        bench = self._bench

        def ready() -> None:
            bench.prepare_warm(variant)
            prepare()

        tier = variant.store.partition("://")[0]
        self._add(name, functools.partial(bench.reusing, **request), ready, self._checked("warm", tier))
        self.rows[name] = dataclasses.replace(row, donor_bytes=bench.donor_bytes())

    def _add(
        self,
        name: str,
        run: Callable[[], object],
        prepare: Callable[[], None] = do_nothing,
        check: Callable[[], None] = do_nothing,
    ) -> None:
        self.systems[name] = System(run, prepare, check, synchronize=self._bench.synchronize)
        self.rows[name] = TierRow(name, [])
        for _ in range(2):  # compiles, and again with all programs
            time_once(self.systems[name])

    def _checked(self, mode: str, tier: str = "") -> Callable[[], None]:
        def check() -> None:
            report = self._bench.report()
            tiers = {span["donor_tier"] for span in report["spans"]}
            if report["mode"] != mode or (tier and tiers != {tier}):
                raise MeasurementError(
                    f"the run was {report['mode']} from {tiers}, not {mode} from {tier or 'nowhere'}: "
                    f"{self._bench.why_not_reused()}"
                )

        return check
