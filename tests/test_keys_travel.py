"""Keys are the same in every process; keys of another version are not found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlcache_fx.keys import entry_key
from vlcache_fx.keys.entry_key import KeyScope
from vlcache_fx.runtime.requests import keyed
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import own_compiler_state, with_backend

SCRIPT = Path(__file__).with_name("keys_of_a_process.py")


def keys_of_a_process(folder: Path, sizes: str, seed: int) -> dict[str, list[str]]:
    """Run the script with its own hash seed, in the folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(folder / "model"), sizes],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_processes_record_the_same_keys(tmp_path: Path) -> None:
    first = keys_of_a_process(tmp_path, "static", seed=1)
    second = keys_of_a_process(tmp_path, "dynamic", seed=2)
    for name, keys in first.items():
        kinds = [key.partition("-")[0] for key in keys]
        assert (kinds.count("donor"), kinds.count("features")) == (2, 2)
        assert second[name] == keys, name
    assert len({tuple(keys) for keys in first.values()}) == len(first)


def test_version_is_part_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = KeyScope("", "f" * 64)
    first = scope.key("donor", {"content": "x"})
    monkeypatch.setattr(entry_key, "KEY_VERSION", entry_key.KEY_VERSION + 1)
    second = scope.key("donor", {"content": "x"})
    assert first != second
    assert {name for name in first.parts if first.parts[name] != second.parts[name]} == {"format"}


def test_entries_of_another_version_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(1 << 26)

    def ask() -> tuple[str, Any]:
        pair = with_backend(tiny_vlm(last_only=False), store=store, policy="full", min_span_tokens=4)
        off, report = pair.run(**tiny_vlm_inputs(7, 5, [(20, 0)], text_seed=1))
        assert off == 0.0
        return report["mode"], report["encoder_hit"]

    with own_compiler_state(), torch.no_grad():
        assert [ask(), ask()] == [("cold", False), ("warm", True)]
        for module in (entry_key, keyed):
            monkeypatch.setattr(module, "KEY_VERSION", 2)
        assert [ask(), ask()] == [("cold", False), ("warm", True)]
