import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from examples.vs_vllm import __main__ as module
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from vlcache_fx.bench.machine import describe_machine

FACTS = {"vllm": "0.32.0", "torch": "2.13.0", "transformers": "5.19.0", "threads": 2}


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(module.main)
    return app


def test_main_rejects_strip_before_installation(command: typer.Typer, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--vision-tokens", "13", "--environment", str(tmp_path / "peers")])
    assert done.exit_code == 1
    assert "vision_tokens=13" in done.output
    assert not (tmp_path / "peers").exists()


def test_main_environment_error(
    command: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(self: Environment, say: Any) -> None:
        raise PeerError("cannot build vLLM's environment: pip failed with\n[no space]")

    monkeypatch.setattr(Environment, "make", make)
    done = CliRunner().invoke(command, ["--environment", str(tmp_path)])
    assert done.exit_code == 1
    assert "[no space]" in done.output


def test_default_folder_in_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_folder() == tmp_path / "vlcache_fx" / "peers"


def test_own_cores_limited_by_threads() -> None:
    assert len(module.own_cores(1)) == 1
    assert module.own_cores(0) == sorted(set(module.own_cores(0)))


def test_describe_in_one_line() -> None:
    machine = describe_machine()
    line = module.describe(machine, FACTS)
    assert machine.processor in line
    assert "vLLM 0.32.0 with 2 threads" in line
    assert json.dumps(dataclasses.asdict(machine))
