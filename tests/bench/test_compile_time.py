import dataclasses
import json
import subprocess
from typing import Any

import pytest

from vlcache_fx.bench import compile_time
from vlcache_fx.bench.compile_time import Task, measure_compile_time
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import RequestShape

TASK = Task("plain", find_preset("tiny"), RequestShape(24), "eager", "float32", "cpu")


def finished(returncode: int, stdout: str = "", stderr: str = "") -> Any:
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_measure_compile_time_first_and_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[tuple[str, int, str]] = []

    def child(command: list[str], *, input: str, env: dict[str, str], **_: Any) -> Any:  # noqa: A002
        task = json.loads(input)
        depth = task["spec"]["config"]["text_config"]["num_hidden_layers"]
        children.append((task["system"], depth, env["TORCHINDUCTOR_CACHE_DIR"]))
        assert env["TRITON_CACHE_DIR"].startswith(env["TORCHINDUCTOR_CACHE_DIR"])
        return finished(0, 'a line of a library\n{"seconds": 2.5, "not_reused": null}\n')

    monkeypatch.setattr(compile_time.subprocess, "run", child)
    found = measure_compile_time(TASK, [1, 3])
    assert [(one.system, one.layers, one.process) for one in found] == [
        (system, depth, process)
        for depth in (1, 3)
        for system in ("plain", "vlcache")
        for process in ("first", "second")
    ]
    assert {one.seconds for one in found} == {2.5}
    caches = [cache for _, _, cache in children]
    assert caches[0::2] == caches[1::2]
    assert len(set(caches)) == 4


def test_measure_compile_time_failed_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_time.subprocess, "run", lambda *_, **__: finished(1, stderr="out of luck"))
    with pytest.raises(MeasurementError, match="compiling plain in a child process failed: out of luck"):
        measure_compile_time(TASK, [1])


@pytest.mark.parametrize("system", ["plain", "vlcache"])
def test_main_compiles_the_system(system: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    task = dataclasses.replace(TASK, system=system)
    monkeypatch.setattr("sys.stdin.read", lambda: json.dumps(dataclasses.asdict(task)), raising=False)
    compile_time.main()
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["not_reused"] is None
    assert answer["seconds"] > 0
