"""Installs what the servers need into vLLM's environment, and leaves its versions as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from examples.vs_vllm.environment import Environment, run

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
    freeze = [*pip, "freeze", "--exclude-editable"]
    say(" ".join(freeze))
    versions.write_text(run(freeze), encoding="utf-8")
    install_wanted = [*pip, "install", "--constraint", str(versions), *wanted]
    say(" ".join(install_wanted))
    run(install_wanted)
    stamp.write_text("\n".join(wanted), encoding="utf-8")
