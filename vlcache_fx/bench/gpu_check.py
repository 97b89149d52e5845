"""A quick check of tests and times on a GPU: ``make gpu-check``, or ``python -m vlcache_fx.bench.gpu_check``.

Runs the tests marked ``gpu``, then the main timings, one step each. Results are written after every step: an
interrupted check keeps them. A step that fails or exceeds its time is recorded, and the next step starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vlcache_fx.bench.decoding import decoding_systems
from vlcache_fx.bench.device import device_name, dtype_name
from vlcache_fx.bench.floor import PrefixHitBaseline
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.report import milliseconds
from vlcache_fx.bench.rounds import MeasurementError, Summary, System, time_once
from vlcache_fx.bench.systems import GIB, Systems, Variant
from vlcache_fx.bench.workload import RequestShape, Workload, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.errors import OptionError
from vlcache_fx.version import VERSION

RESULT, TABLE = "gpu_check.json", "gpu_check.md"
"""Files of the result, and of its table in Markdown."""

DEVICE_TIER, HOST_TIER = Variant(), Variant(store="host://")


@dataclasses.dataclass(frozen=True)
class Step:
    """Result of one step.

    Attributes:
        name: what was timed.
        vision_tokens: tokens of the image; None for tests.
        seconds: one value per round; fewer rounds if the time was up.
        first_seconds: duration of the first call, with compilation.
        took_seconds: duration of the step.
        error: why it failed or was skipped, on one line; None on success.
        notes: other results.
    """

    name: str
    vision_tokens: int | None
    seconds: tuple[float, ...] = ()
    first_seconds: float | None = None
    took_seconds: float = 0.0
    error: str | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Record:
    """The result so far; both files are rewritten after every step.

    Args:
        folder: folder of both files; created if it does not exist.
        facts: description of the machine and the model.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._facts, self.steps = folder, facts, list[Step]()
        self.write()

    def add(self, step: Step) -> None:
        """Add a step, and print its line."""
        self.steps.append(step)
        self.write()
        typer.echo(_line(step))

    def write(self, *, is_finished: bool = False) -> None:
        """Write both files."""
        steps = [dataclasses.asdict(step) for step in self.steps]
        result = {**self._facts, "is_finished": is_finished, "steps": steps}
        replace_file(self._folder / RESULT, json.dumps(result, indent=2) + "\n")
        replace_file(self._folder / TABLE, table(self._facts, self.steps))


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def table(facts: dict[str, Any], steps: Sequence[Step]) -> str:
    """Format the result in Markdown."""
    lines = [f"{name}: {value}  " for name, value in facts.items()]
    lines += ["", "| vision tokens | step | median | lowest to highest | rounds | first call | |"]
    lines += ["|---:|---|---:|---:|---:|---:|---|"]
    return "\n".join([*lines, *map(_line, steps)]) + "\n"


def _line(step: Step) -> str:
    found = Summary.of(step.seconds) if step.seconds else None
    cells = [
        "" if step.vision_tokens is None else f"{step.vision_tokens:,}",
        step.name,
        "" if found is None else milliseconds(found.median),
        "" if found is None else f"{milliseconds(found.low)} to {milliseconds(found.high)}",
        str(len(step.seconds)) if step.seconds else "",
        "" if step.first_seconds is None else f"{step.first_seconds:.1f} s",
        step.error or "; ".join(f"{name} {value}" for name, value in step.notes.items()),
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


class TooLong(BaseException):
    """A step's time is up. Not an ``Exception``: code that falls back after any error must not keep it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise ``TooLong`` in the body when its time is up, at the next Python instruction.

    Works in the main thread of systems with timers; elsewhere there is no limit.
    """
    can_stop = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can_stop:
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Check:
    """Runs steps in sequence.

    Args:
        record: receives the results.
        rounds: timing rounds.
        step_seconds: time limit of each step.
        total_seconds: no step starts after this time.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        record: Record,
        rounds: int,
        step_seconds: float,
        total_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record, self._rounds, self._step_seconds = record, rounds, step_seconds
        self._clock, self._end = clock, clock() + total_seconds

    @property
    def left_seconds(self) -> float:
        """Time until no further step starts."""
        return self._end - self._clock()

    def step(self, name: str, vision_tokens: int | None, body: Callable[[], dict[str, Any]]) -> bool:
        """Run one step; ``body`` returns fields of ``Step``. Return True on success."""
        start, found = self._clock(), Step(name, vision_tokens)
        allowed = min(self._step_seconds, self.left_seconds)
        if allowed <= 0:
            self._record.add(dataclasses.replace(found, error="skipped: the check's time is up"))
            return False
        try:
            with at_most(allowed):
                found = dataclasses.replace(found, **body())
        except (Exception, TooLong) as error:  # noqa: BLE001 - the next step runs in any case
            text = " ".join(f"{type(error).__name__}: {error}".split())
            found = dataclasses.replace(found, error=text[:500])
        self._record.add(dataclasses.replace(found, took_seconds=round(self._clock() - start, 3)))
        return found.error is None

    def time(
        self, name: str, vision_tokens: int, make: Callable[[], tuple[System, Callable[[], dict[str, Any]]]]
    ) -> bool:
        """Time a system: once to compile, once to warm up, then in rounds while there is time.

        Args:
            name: see ``Step``.
            vision_tokens: see ``Step``.
            make: returns the system, and a function that returns notes after its last run.
        """

        def body() -> dict[str, Any]:
            system, notes = make()
            begun = self._clock()
            first = time_once(system)
            time_once(system)
            seconds: list[float] = []
            while len(seconds) < self._rounds:
                seconds.append(time_once(system))
                if self._clock() - begun > 0.8 * self._step_seconds:
                    break
            return {"seconds": tuple(seconds), "first_seconds": first, "notes": notes()}

        return self.step(name, vision_tokens, body)


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked ``gpu`` in a child process."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if find_spec("xdist") is not None:
        command += ["--numprocesses", str(min(6, os.cpu_count() or 1)), "--dist", "loadfile"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(  # noqa: S603 - our own tests
        command, cwd=root, capture_output=True, text=True, timeout=max(seconds, 1.0), check=False
    )
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing was printed").splitlines()
    if done.returncode not in (0, 5):  # 5: no tests collected
        raise MeasurementError(f"pytest returned {done.returncode}: {' / '.join(lines[-8:])}")
    return {"notes": {"pytest": lines[-1]}}


def times(
    check: Check, model: Any, vision_tokens: Sequence[int], lowering: str, *, cuda_graphs: bool
) -> None:
    """Time all systems of one model.

    Args:
        check: runs the steps.
        model: in eval mode, on its device.
        vision_tokens: tokens of each image.
        lowering: lowering of the compiled models.
        cuda_graphs: time only warm runs, with CUDA graphs.
    """
    capacity = max(4 * GIB, 2 * max(vision_tokens) * _bytes_per_token(model))
    systems = Systems(model, lowering, [DEVICE_TIER, HOST_TIER], capacity, cuda_graphs=cuda_graphs)
    try:
        with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
            for tokens in vision_tokens:
                made: list[Workload] = []

                def workload(tokens: int = tokens, made: list[Workload] = made) -> dict[str, Any]:
                    made.append(make_workload(model, RequestShape(tokens)))
                    return {"notes": {"tokens": made[0].num_tokens}}

                suffix = " of CUDA graphs" if cuda_graphs else ""
                if check.step(f"requests{suffix}", tokens, workload):
                    _times_of(check, systems, made[0], cuda_graphs=cuda_graphs)
                systems.forget_donors()
    finally:
        systems.close()


def _times_of(check: Check, systems: Systems, workload: Workload, *, cuda_graphs: bool) -> None:
    tokens = workload.shape.vision_tokens
    rows: list[int] = []

    def plain() -> tuple[System, Callable[[], dict[str, Any]]]:
        run = System(lambda: systems.compiled_long(**workload.second), synchronize=systems.synchronize)
        return run, dict

    def cold() -> tuple[System, Callable[[], dict[str, Any]]]:
        run = System(
            lambda: systems.reusing(**workload.first),
            systems.prepare_cold,
            lambda: _expect(systems, "cold"),
            synchronize=systems.synchronize,
        )
        return run, dict

    def warm(variant: Variant) -> tuple[System, Callable[[], dict[str, Any]]]:
        systems.prepare_warm(variant)
        systems.reusing(**workload.first)  # records donors

        def notes() -> dict[str, Any]:
            report = systems.report()
            rows[:] = [report["rows_per_layer"][0]]
            tiers = sorted({str(span["donor_tier"]) for span in report["spans"]})
            timings = {name: round(value, 3) for name, value in report["timings_ms"].items()}
            return {"rows": rows[0], "tier": ", ".join(tiers), "steps_ms": timings}

        run = System(
            lambda: systems.reusing(**workload.second),
            lambda: systems.prepare_warm(variant),
            lambda: _expect(systems, "warm"),
            synchronize=systems.synchronize,
        )
        return run, notes

    def floor() -> tuple[System, Callable[[], dict[str, Any]]]:
        if not rows:
            raise MeasurementError("no warm run reported its number of rows")
        hit = PrefixHitBaseline(systems.compiled, workload, rows[0], model=systems.plain)
        run = System(hit.run, hit.prepare, hit.check, synchronize=systems.synchronize)
        return run, lambda: {"rows": hit.rows}

    if cuda_graphs:
        check.time("warm, CUDA graphs", tokens, lambda: warm(DEVICE_TIER))
        return
    check.time("cold", tokens, cold)
    check.time("warm", tokens, lambda: warm(DEVICE_TIER))
    check.time("warm, host tier", tokens, lambda: warm(HOST_TIER))
    check.time("torch.compile", tokens, plain)
    check.time("floor (prefix hit)", tokens, floor)
    steps: dict[str, System] = {}
    for name in ("torch.compile", "vlcache"):

        def step(name: str = name) -> tuple[System, Callable[[], dict[str, Any]]]:
            if not steps:
                steps.update(decoding_systems(systems, workload))
            wanted = next(system for label, system in steps.items() if label.endswith(name))
            return wanted, dict

        check.time(f"a decoding step, {name}", tokens, step)


def _expect(systems: Systems, mode: str) -> None:
    report = systems.report()
    if report["mode"] != mode:
        raise MeasurementError(f"the {mode} run was {report['mode']}: {systems.why_not_reused()}")


def _bytes_per_token(model: Any) -> int:
    """Bytes of a donor per token: keys and values of all layers, and the last state."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * width + config.hidden_size
    return int(values * model.dtype.itemsize)


def describe(preset: str, dtype: torch.dtype, device: torch.device, lowering: str) -> dict[str, Any]:
    """Describe machine, versions, commit and model."""
    machine = describe_machine()
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],  # noqa: S607
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "preset": preset,
        "dtype": dtype_name(dtype),
        "lowering": lowering,
        "device": device_name(device, machine.processor),
        "processor": machine.processor,
        "cores": machine.cores,
        "python": platform.python_version(),
        "torch": machine.torch,
        "cuda": torch.version.cuda or "none",
        "transformers": machine.transformers,
        "vlcache_fx": VERSION,
        "commit": commit,
    }


def gpu_check(
    preset: str = "qwen2.5-vl-7b",
    output: Path = Path("gpu_check"),
    *,
    vision_tokens: Sequence[int] = (4096, 16384),
    rounds: int = 5,
    lowering: str = "inductor",
    step_seconds: float = 120.0,
    total_seconds: float = 570.0,
    tests: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> list[Step]:
    """Run the check; see ``main``.

    Raises:
        OptionError: a value is not valid.
    """
    spec = find_preset(preset).with_feature_tower()
    if rounds < 1 or not vision_tokens or min(vision_tokens) < 1:
        raise OptionError(f"rounds={rounds} and vision_tokens={list(vision_tokens)} must be positive")
    if step_seconds <= 0 or total_seconds <= 0:
        raise OptionError(f"step_seconds={step_seconds} and total_seconds={total_seconds} must be positive")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = Record(Path(output), describe(preset, dtype, device, lowering))
    check = Check(record, rounds, step_seconds, total_seconds, clock)
    if tests:
        allowed = min(step_seconds, check.left_seconds)
        check.step("tests marked gpu", None, lambda: run_tests(allowed - 1.0))
    built: list[Any] = []

    def build() -> dict[str, Any]:
        built.append(build_model(spec, dtype, device))
        return {"notes": {"layers": built[0].config.get_text_config().num_hidden_layers}}

    if check.step("the model", None, build):
        for cuda_graphs in (False, True):
            try:
                times(check, built[0], vision_tokens, lowering, cuda_graphs=cuda_graphs)
            except Exception as error:  # noqa: BLE001 - the other mode may work
                record.add(Step("times", None, error=" ".join(f"{type(error).__name__}: {error}".split())))
    record.write(is_finished=True)
    return record.steps


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "qwen2.5-vl-7b",
    output: Annotated[Path, typer.Option(help="folder of the result")] = Path("gpu_check"),
    vision_tokens: Annotated[str, typer.Option(help="tokens of each image, comma-separated")] = "4096,16384",
    rounds: Annotated[int, typer.Option(min=1, help="timing rounds")] = 5,
    lowering: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    step_seconds: Annotated[float, typer.Option(help="time limit of each step")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="no step starts after this time")] = 570.0,
    tests: Annotated[bool, typer.Option(help="run the tests marked gpu first")] = True,
) -> None:
    """Write gpu_check.json and a table after every step; fail if a step fails."""
    sizes = tuple(int(size) for size in vision_tokens.split(","))
    steps = gpu_check(
        preset, output, vision_tokens=sizes, rounds=rounds, lowering=lowering, step_seconds=step_seconds,
        total_seconds=total_seconds, tests=tests,
    )  # fmt: skip
    failed = [step for step in steps if step.error is not None]
    typer.echo(f"{len(steps) - len(failed)} of {len(steps)} steps done; see {Path(output) / RESULT}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
