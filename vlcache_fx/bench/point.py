"""Measures all systems on one workload."""

import dataclasses
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.bench.floor import PrefixHitBaseline
from vlcache_fx.bench.memory import PeakMemory, peak_memory
from vlcache_fx.bench.rounds import (
    MeasurementError,
    Summary,
    System,
    do_nothing,
    interleave,
    paired_ratio,
    time_once,
)
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.workload import RequestShape, Workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings


@dataclasses.dataclass(frozen=True)
class WarmRun:
    """Results of a variant.

    Attributes:
        variant: policy, budget and store.
        floor: name of the prefix hit with as many rows.
        report: the engine's report of the last timed run.
        step_ms: milliseconds per step of a call, from the engine's reports; ``other`` is the rest of the
            call (guards, the model's Python, and on a GPU the kernels still running).
        donor_bytes: bytes of the images' donors in the store.
    """

    variant: Variant
    floor: str
    report: dict[str, Any]
    step_ms: dict[str, Summary]
    donor_bytes: int

    @property
    def tier(self) -> str:
        """Tier of the donors."""
        return ", ".join(sorted({str(span["donor_tier"]) for span in self.report["spans"]}))


@dataclasses.dataclass(frozen=True)
class Point:
    """Results of all systems on one workload.

    Attributes:
        shape: the requests' shape.
        vision_tokens, num_tokens: tokens per sample, with all images.
        starts: position of the first image's first token in the first and in the second request.
        seconds: system -> seconds per round.
        first_call_seconds: compiled system -> seconds of its first call at this point minus those of a later
            call: compilation, unless an earlier point caused it.
        ratios: ``"a / b"`` within each round.
        cold_rows: rows per layer of the cold run; empty if there was none.
        cold_difference: largest difference of the logits, cold against plain, over their largest value.
        warm: system -> results of its variant.
        floor_rows: prefix hit -> number of rows.
        not_reused: system that runs unmodified -> reason.
        peak_memory: system -> peak of a run that was not timed.
        eager_recurrences: whether the plain ``torch.compile`` leaves recurrent modules to eager execution.
    """

    shape: RequestShape
    vision_tokens: int
    num_tokens: int
    starts: tuple[int, int]
    seconds: dict[str, list[float]]
    first_call_seconds: dict[str, float]
    ratios: dict[str, Summary]
    cold_rows: tuple[int, ...]
    cold_difference: float | None
    warm: dict[str, WarmRun]
    floor_rows: dict[str, int]
    not_reused: dict[str, str]
    peak_memory: dict[str, PeakMemory | None]
    eager_recurrences: bool = False


def measure_point(
    systems: Systems,
    workload: Workload,
    rounds: int,
    eager_rounds: int,
    after_run: Callable[[], None] = do_nothing,
) -> Point:
    """Warm up, time all systems in turn, then measure the peak memory of each.

    Args:
        systems: the systems to compare.
        workload: their requests.
        rounds: timing rounds; at least one.
        eager_rounds: rounds with the unmodified eager model.
        after_run: called after each timed run, at most ``runs_of_point`` times.

    Raises:
        MeasurementError: a run had another mode than expected.
    """
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        point = _PointBench(systems, workload, eager_rounds)
        point.warm_up()
        seconds = interleave(point.systems, rounds, after_run)
        peaks = {name: point.peak(name) for name in point.systems}
    systems.forget_donors()
    return point.result(seconds, peaks)


def runs_of_point(variants: Sequence[Variant], rounds: int, eager_rounds: int) -> int:
    """Return the maximum number of timed runs: each variant may have its own prefix hit."""
    return (2 + 2 * len(variants)) * rounds + min(rounds, eager_rounds)


class _PointBench:
    def __init__(self, systems: Systems, workload: Workload, eager_rounds: int) -> None:
        self._bench, self._workload, self._eager_rounds = systems, workload, eager_rounds
        self.systems: dict[str, System] = {}
        self._variants: dict[str, Variant] = {}
        self._donor_bytes: dict[str, int] = {}
        self._floors: dict[str, PrefixHitBaseline] = {}
        self._floor_of: dict[str, str] = {}
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._first_calls: dict[str, float] = {}
        self._not_reused: dict[str, str] = {}
        self._cold_rows: tuple[int, ...] = ()
        self._cold_difference: float | None = None
        self._graphs: int | None = None

    def warm_up(self) -> None:
        """Compile all systems, record donors, fill caches, and run all systems twice more."""
        bench, request = self._bench, self._workload.second
        self._add("eager", lambda: bench.plain(**request), rounds=self._eager_rounds)
        self._add("plain", lambda: bench.compiled_long(**request))
        self._first_calls["plain"] = time_once(self.systems["plain"])
        if self._add_cold():
            single = len(bench.variants) == 1
            for variant in bench.variants:
                self._add_warm("warm" if single else f"warm {variant.label}", variant)
            self._add_floors()
        for name in self.systems:
            if name != "eager":
                for _ in range(2):
                    time_once(self.systems[name])
        for reports in self._reports.values():
            reports.clear()
        self._graphs = bench.graphs_compiled()

    def _add(self, name: str, run: Callable[[], object], **options: Any) -> None:
        check = options.pop("check", do_nothing)

        def checked() -> None:
            check()
            if self._graphs is not None and self._bench.graphs_compiled() != self._graphs:
                raise MeasurementError(f"{name}: a timed run compiled a graph")

        self.systems[name] = System(run, check=checked, synchronize=self._bench.synchronize, **options)

    def _add_cold(self) -> bool:
        """Return True if cold runs record donors; otherwise store the reason and time the unmodified call."""
        bench, request = self._bench, self._workload.first
        bench.prepare_cold()
        run = System(lambda: bench.reusing(**request), synchronize=bench.synchronize)
        self._first_calls["cold"] = time_once(run)
        report = bench.report()
        if report["mode"] != "cold" or not report["spans"]:
            self._not_reused["vlcache"] = bench.why_not_reused()
            self._first_calls["not reused"] = self._first_calls.pop("cold")
            self._add("not reused", run.run, prepare=bench.prepare_cold)
            return False
        self._cold_rows = tuple(report["rows_per_layer"])
        self._cold_difference = self._difference()
        self._add("cold", run.run, prepare=bench.prepare_cold, check=self._check_cold)
        return True

    def _difference(self) -> float:
        def logits(model: Any) -> Tensor:
            result: Tensor = model(**self._workload.first).logits
            return result[:, -1].float()

        expected = logits(self._bench.compiled_long)
        self._bench.prepare_cold()
        return float((logits(self._bench.reusing) - expected).abs().max() / expected.abs().max())

    def _check_cold(self) -> None:
        report = self._bench.report()
        if report["mode"] != "cold":
            raise MeasurementError(f"the cold run was {report['mode']}: {report['reason']}")

    def _add_warm(self, name: str, variant: Variant) -> None:
        bench, request = self._bench, self._workload.second
        bench.prepare_warm(variant)
        bench.reusing(**self._workload.first)  # records donors, if they are missing
        check = self._check_warm(name)
        run = System(lambda: bench.reusing(**request), lambda: bench.prepare_warm(variant))
        self._first_calls[name] = time_once(run)
        report = bench.report()
        if report["mode"] != "warm":
            self._not_reused[name] = bench.why_not_reused()
            self._first_calls.pop(name)
            return
        self._variants[name], self._reports[name] = variant, [report]
        self._donor_bytes[name] = bench.donor_bytes()
        self._add(name, run.run, prepare=run.prepare, check=check)

    def _check_warm(self, name: str) -> Callable[[], None]:
        def check() -> None:
            report = self._bench.report()
            if report["mode"] != "warm" or not all(span["hit"] for span in report["spans"]):
                raise MeasurementError(f"the run {name!r} was {report['mode']}: {report['reason']}")
            self._reports[name].append(report)

        return check

    def _add_floors(self) -> None:
        """Add one prefix hit per number of rows."""
        numbers = {name: reports[0]["rows_per_layer"][0] for name, reports in self._reports.items()}
        single = len(set(numbers.values())) == 1
        for name, rows in numbers.items():
            self._floor_of[name] = floor_name = "floor" if single else f"floor of {rows} rows"
            if floor_name not in self._floors:
                bench, request = self._bench, self._workload
                floor = PrefixHitBaseline(bench.compiled, request, rows, model=bench.plain)
                self._floors[floor_name] = floor
                self._add(floor_name, floor.run, prepare=floor.prepare, check=floor.check)

    def peak(self, name: str) -> PeakMemory | None:
        """Measure the peak memory of one run of a system."""
        system = self.systems[name]
        system.prepare()
        peak = peak_memory(system.run, self._bench.device)
        system.check()
        return peak

    def result(self, seconds: dict[str, list[float]], peaks: dict[str, PeakMemory | None]) -> Point:
        """Return the point."""
        usual = {name: median(values) for name, values in seconds.items() if values}
        pairs = [("cold", "plain"), ("not reused", "plain")]
        for name in self._variants:
            pairs += [("plain", name), ("eager", name), (name, self._floor_of[name])]
        return Point(
            shape=self._workload.shape,
            vision_tokens=self._workload.vision_tokens,
            num_tokens=self._workload.num_tokens,
            starts=self._workload.starts,
            seconds=seconds,
            first_call_seconds={name: first - usual[name] for name, first in self._first_calls.items()},
            ratios={
                f"{a} / {b}": paired_ratio(seconds[a], seconds[b])
                for a, b in pairs
                if seconds.get(a) and seconds.get(b)
            },
            cold_rows=self._cold_rows,
            cold_difference=self._cold_difference,
            warm={name: self._warm_run(name, seconds[name]) for name in self._variants},
            floor_rows={name: floor.rows for name, floor in self._floors.items()},
            not_reused=self._not_reused,
            peak_memory=peaks,
            eager_recurrences=self._bench.eager_recurrences,
        )

    def _warm_run(self, name: str, seconds: list[float]) -> WarmRun:
        steps: dict[str, list[float]] = {}
        timed = self._reports[name][: len(seconds)]  # the last report is of the run for peak memory
        for report, total in zip(timed, seconds, strict=True):
            timings = report["timings_ms"]
            for step, milliseconds in timings.items():
                steps.setdefault(step, []).append(milliseconds)
            steps.setdefault("other", []).append(1e3 * total - sum(timings.values()))
        summaries = {step: Summary.of(values) for step, values in steps.items()}
        return WarmRun(
            self._variants[name], self._floor_of[name], timed[-1], summaries, self._donor_bytes[name]
        )
