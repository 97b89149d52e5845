"""The GPU check with a tiny model on any device. Times are not checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import torch
import typer

from vlcache_fx.bench import gpu_check as checked
from vlcache_fx.bench.gpu_check import RESULT, TABLE, Check, Record, Step, at_most, gpu_check, main, run_tests
from vlcache_fx.bench.rounds import MeasurementError, System
from vlcache_fx.errors import OptionError

TINY: dict[str, Any] = {"vision_tokens": (60,), "rounds": 2, "lowering": "eager", "tests": False}


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return found


def test_gpu_check_times_every_system(tmp_path: Path) -> None:
    steps = gpu_check("tiny", tmp_path, **TINY)
    assert [step.error for step in steps] == [None] * len(steps)
    kinds = [
        "torch.compile", "cold", "warm", "warm, host tier", "floor (prefix hit)",
        "a decoding step, torch.compile", "a decoding step, vlcache", "warm, CUDA graphs",
    ]  # fmt: skip
    timed = {(step.name, step.vision_tokens): step for step in steps if step.seconds}
    sizes = list(dict.fromkeys(tokens for _, tokens in timed))
    assert len(sizes) == 1
    assert set(timed) == {(name, tokens) for name in kinds for tokens in sizes}
    assert all(len(step.seconds) == 2 for step in timed.values())
    found = result(tmp_path)
    assert found["is_finished"]
    assert {"preset", "device", "torch", "transformers", "python", "commit", "dtype"} <= set(found)
    assert [step["name"] for step in found["steps"]] == [step.name for step in steps]
    for tokens in sizes:
        assert timed["warm, host tier", tokens].notes["tier"] == "host"
        assert timed["floor (prefix hit)", tokens].notes["rows"] == timed["warm", tokens].notes["rows"]
    lines = (tmp_path / TABLE).read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(steps) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([RESULT, TABLE])


def test_gpu_check_continues_after_failed_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **options: object) -> None:
        raise MeasurementError(f"out of\norder {options}")

    monkeypatch.setattr(checked, "build_model", lambda *_: torch.nn.Module())
    steps = gpu_check("tiny", tmp_path, **TINY)
    assert [step.name for step in steps] == ["the model"]
    assert steps[0].error is not None  # it has no configuration

    record = Record(tmp_path, {})
    check = Check(record, 1, 60, 60)
    assert not check.step("fails", 1, fails)  # type: ignore[arg-type]
    assert check.step("does not", 1, dict)
    assert [step.error for step in record.steps] == ["MeasurementError: out of order {}", None]


def test_record_survives_interruption(tmp_path: Path) -> None:
    record = Record(tmp_path / "new", {"torch": torch.__version__})
    check = Check(record, 3, 60, 60)
    check.step("one", 4096, lambda: {"seconds": (0.5, 0.7), "notes": {"rows": 3}})

    def stopped() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check.step("two", 4096, stopped)
    found = result(tmp_path / "new")
    assert (found["is_finished"], [step["name"] for step in found["steps"]]) == (False, ["one"])
    assert "| 4,096 | one | 600 ms | 500 ms to 700 ms | 2 |  | rows 3 |" in (
        tmp_path / "new" / TABLE
    ).read_text(encoding="utf-8")


def test_check_time_limits(tmp_path: Path) -> None:
    now = [0.0]

    def passes() -> None:
        now[0] += 30.0

    record = Record(tmp_path, {})
    check = Check(record, 9, 100.0, 130.0, lambda: now[0])
    assert check.time("slow", 1, lambda: (System(passes), dict))
    (slow,) = record.steps
    assert (len(slow.seconds), slow.took_seconds) == (1, 90.0)
    assert check.left_seconds == 40.0
    now[0] = 131.0
    assert not check.step("too late", 1, dict)
    assert record.steps[-1] == Step("too late", 1, error="skipped: the check's time is up")


def test_at_most_stops_the_step() -> None:
    def never_ends() -> None:
        with at_most(0.01):
            while True:
                pass

    with pytest.raises(checked.TooLong, match="stopped after 0 s"):
        never_ends()
    with at_most(60):
        pass


def test_run_tests_in_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) - 1, "one\n3 passed in 2 s", "")

    monkeypatch.setattr(subprocess, "run", ran)
    assert run_tests(5.0) == {"notes": {"pytest": "3 passed in 2 s"}}
    assert asked[0][:6] == [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    with pytest.raises(MeasurementError, match="pytest returned 1: one / 3 passed"):
        run_tests(5.0)


def test_gpu_check_bad_values(tmp_path: Path) -> None:
    for wrong in ({"rounds": 0}, {"vision_tokens": ()}, {"step_seconds": 0.0}, {"total_seconds": -1.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            gpu_check("tiny", tmp_path, **{**TINY, **wrong})
    with pytest.raises(OptionError, match="preset='huge'"):
        gpu_check("huge", tmp_path)


def test_main_fails_with_a_failed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checked, "gpu_check", lambda *_, **__: [Step("one", 1), Step("two", 1, error="?")])
    with pytest.raises(typer.Exit):
        main("tiny", tmp_path)
    assert capsys.readouterr().out.startswith("1 of 2 steps done")
