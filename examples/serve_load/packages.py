"""Installs what the servers need into vLLM's environment, and leaves its versions as they are."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError

ROOT = Path(__file__).resolve().parents[2]
"""This project."""

ADDED = ("accelerate",)
"""For ``transformers serve``."""

STAMP, KEPT = "serve_load.txt", "versions.txt"


def install(environment: Environment, say: Callable[[str], None]) -> None:
    """Install this project, and what ``transformers serve`` needs, unless they are there.

    Args:
        environment: has vLLM already.
        say: receives each step.

    Raises:
        PeerError: a step failed; the message has the end of its output.
    """
    stamp, versions = environment.venv / STAMP, environment.venv / KEPT
    wanted = [f"--editable={ROOT}[serve]", *ADDED]
    if stamp.exists() and stamp.read_text(encoding="utf-8") == "\n".join(wanted):
        return
    pip = [str(environment.python), "-m", "pip"]
    versions.write_text(_run([*pip, "freeze", "--exclude-editable"], say), encoding="utf-8")
    _run([*pip, "install", "--constraint", str(versions), *wanted], say)
    stamp.write_text("\n".join(wanted), encoding="utf-8")


def _run(command: list[str], say: Callable[[str], None]) -> str:
    say(" ".join(command))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise PeerError(f"{' '.join(command)} failed with\n{tail}")
    return done.stdout
