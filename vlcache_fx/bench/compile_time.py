"""Compile times, measured in a child process: ``python -m vlcache_fx.bench.compile_time``.

The child reads a ``Task`` as JSON from its standard input and prints the seconds as the last line. The parent
runs it twice with one cache directory, first empty, then filled, like two processes of a deployment.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.bench.rounds import MeasurementError, System, do_nothing, time_once
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings

SYSTEMS = ("plain", "vlcache")
PROCESSES = ("first", "second")


@dataclasses.dataclass(frozen=True)
class Task:
    """A child's task: a model, a request, and the system ``plain`` or ``vlcache`` (cold and warm)."""

    system: str
    spec: ModelSpec
    shape: RequestShape
    lowering: str
    dtype: str
    device: str


@dataclasses.dataclass(frozen=True)
class CompileTime:
    """Seconds until a system is ready.

    Attributes:
        system: ``plain`` or ``vlcache`` (cold and warm program).
        layers: number of decoder layers.
        process: ``first`` with an empty compile cache, ``second`` with a filled one.
        seconds: first calls minus later calls; without the construction of the model.
        not_reused: why the model runs unmodified; None if it does not.
    """

    system: str
    layers: int
    process: str
    seconds: float
    not_reused: str | None = None


def measure_compile_time(
    task: Task, layers: Sequence[int], after_process: Callable[[], None] = do_nothing
) -> list[CompileTime]:
    """Compile with each system at each depth, twice.

    Args:
        task: the task; ``system`` and the depth of ``spec`` are replaced.
        layers: numbers of decoder layers.
        after_process: called ``4 * len(layers)`` times.

    Raises:
        MeasurementError: a child failed.
    """
    found = []
    for depth in layers:
        for system in SYSTEMS:
            asked = dataclasses.replace(task, system=system, spec=task.spec.with_layers(depth))
            with tempfile.TemporaryDirectory() as folder:
                for process in PROCESSES:
                    answer = _run_child(asked, folder)
                    found.append(CompileTime(system, depth, process, answer["seconds"], answer["not_reused"]))
                    after_process()
    return found


def _run_child(task: Task, cache: str) -> dict[str, Any]:
    variables = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "vlcache_fx.bench.compile_time"],
        input=json.dumps(dataclasses.asdict(task)),
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    if done.returncode != 0:
        raise MeasurementError(f"compiling {task.system} in a child process failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compile_seconds(task: Task) -> dict[str, Any]:
    """Compile in this process; return ``seconds``, and ``not_reused`` as in ``CompileTime``."""
    device = torch.device(task.device)
    model = build_model(task.spec.with_feature_tower(), getattr(torch, task.dtype), device)
    systems = Systems(model, task.lowering, [Variant()])
    workload = make_workload(model, task.shape)
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        # Torch loads libraries at its first use: do not count this as compilation.
        model(**workload.second)
        if task.system == "plain":
            return {
                "seconds": _extra(systems, lambda: systems.compiled(**workload.second)),
                "not_reused": None,
            }
        seconds = _extra(systems, lambda: systems.reusing(**workload.first), systems.prepare_cold)
        if systems.report()["mode"] != "cold":
            return {"seconds": seconds, "not_reused": systems.why_not_reused()}
        systems.prepare_warm(systems.variants[0])
        systems.reusing(**workload.first)
        seconds += _extra(systems, lambda: systems.reusing(**workload.second))
        warm = systems.report()["mode"] == "warm"
        return {"seconds": seconds, "not_reused": None if warm else systems.why_not_reused()}


def _extra(systems: Systems, run: Callable[[], object], prepare: Callable[[], None] = do_nothing) -> float:
    """Seconds of the first call minus those of the faster of two later calls."""
    system = System(run, prepare, synchronize=systems.synchronize)
    first = time_once(system)
    return first - min(time_once(system) for _ in range(2))


def main() -> None:
    """Run the child process."""
    given = json.loads(sys.stdin.read())
    spec, shape = ModelSpec(**given.pop("spec")), RequestShape(**given.pop("shape"))
    answer = compile_seconds(Task(spec=spec, shape=shape, **given))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
