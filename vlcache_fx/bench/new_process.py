"""The first answers of a new process about images that another one recorded.

``python -m vlcache_fx.bench.new_process`` reads a ``Task`` as JSON from its standard input, and prints an
``Answers`` as the last line. It compiles its programs with an image of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.bench.rounds import MeasurementError, System, time_once
from vlcache_fx.bench.workload import RequestShape, Workload, make_pixels, make_workload
from vlcache_fx.integrations.transformers import OUTPUTS


@dataclasses.dataclass(frozen=True)
class Task:
    """What a new process answers.

    Attributes:
        spec: the model.
        shape: shape of all requests.
        images: number of recorded images; one more is this process's own.
        dtype: of the model.
        options: of ``vlcache_fx.compile``, with the store.
    """

    spec: ModelSpec
    shape: RequestShape
    images: int
    dtype: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Answers:
    """The first answer about each image.

    Attributes:
        seconds: of each call; no program is compiled in it.
        tiers: tiers of the donors.
        cold_runs: cold runs of the process, all of them about its own image.
    """

    seconds: list[float]
    tiers: list[str]
    cold_runs: int


def from_pixels(model: Any, workload: Workload, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the workload's requests with pixels in the place of features, for ``count`` images of one size.

    Returns:
        Per image, the first request and the second.
    """
    pixels = make_pixels(model, count, workload.shape.vision_tokens)
    requests = []
    for number in range(count):
        own = {name: _part(value, number, count) for name, value in pixels.items()}
        first, second = (
            {name: value for name, value in request.items() if name != OUTPUTS} | own
            for request in (workload.first, workload.second)
        )
        requests.append((first, second))
    return requests


def _part(values: Tensor, number: int, count: int) -> Tensor:
    return values.chunk(count)[number].contiguous()


def ask_new_process(task: Task) -> Answers:
    """Start a process, and return its first answers.

    Raises:
        MeasurementError: it failed, or an answer was not warm.
    """
    done = subprocess.run(
        [sys.executable, "-m", "vlcache_fx.bench.new_process"],
        input=json.dumps(dataclasses.asdict(task)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise MeasurementError(f"the new process failed: {done.stderr[-2000:]}")
    return Answers(**json.loads(done.stdout.splitlines()[-1]))


def answer(task: Task) -> Answers:
    """Compile with an image of this process, then ask about each recorded one for the first time.

    Raises:
        MeasurementError: an answer was not warm, or its features were computed.
    """
    model = build_model(task.spec.with_feature_tower(), getattr(torch, task.dtype), torch.device("cpu"))
    requests = from_pixels(model, make_workload(model, task.shape), task.images + 1)
    compiled: Any = vlcache_fx.compile(model, **task.options)
    engine = compiled.vlcache
    with torch.no_grad():
        for request in (*requests[-1], *requests[-1]):
            compiled(**request)
        engine.store.flush()
        cold_runs = engine.stats()["calls"]["cold"]
        seconds = []
        for _, second in requests[:-1]:
            seconds.append(time_once(System(lambda second=second: compiled(**second))))  # type: ignore[misc]
            report = engine.last_report
            if report["mode"] != "warm" or not report["encoder_hit"]:
                raise MeasurementError(
                    f"the first answer about a recorded image was {report['mode']}, encoder_hit"
                    f" {report['encoder_hit']}: {report['reason']}"
                )
    found = engine.stats()["calls"]["cold"]
    if found != cold_runs:
        raise MeasurementError(f"the new process made {found - cold_runs} cold runs about recorded images")
    tiers = sorted({str(span["donor_tier"]) for span in report["spans"]})
    engine.close()
    return Answers(seconds, tiers, cold_runs)


def main() -> None:
    """Run the new process."""
    given = json.loads(sys.stdin.read())
    spec, shape = ModelSpec(**given.pop("spec")), RequestShape(**given.pop("shape"))
    sys.stdout.write(json.dumps(dataclasses.asdict(answer(Task(spec=spec, shape=shape, **given)))) + "\n")


if __name__ == "__main__":
    main()
