from pathlib import Path

import pytest
import torch

from vlcache_fx.bench import memory
from vlcache_fx.bench.memory import peak_memory

CPU = torch.device("cpu")
SIZE = 64 * 2**20


def fill() -> None:
    torch.ones(SIZE, dtype=torch.uint8)


def test_peak_memory_of_a_call() -> None:
    fill()
    peak = peak_memory(fill, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak.peak_bytes - peak.before_bytes > 0.9 * SIZE
    # Each call resets the peak.
    again = peak_memory(lambda: None, CPU)
    assert again is not None
    assert again.peak_bytes - again.before_bytes < 0.5 * SIZE


def test_peak_memory_unsupported_system_runs_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    calls = []
    assert peak_memory(lambda: calls.append(1), CPU) is None
    assert calls == [1]


@pytest.mark.gpu
def test_peak_memory_on_gpu() -> None:
    device = torch.device("cuda")
    peak = peak_memory(lambda: torch.ones(SIZE, dtype=torch.uint8, device=device), device)
    assert peak is not None
    assert peak.peak_bytes - peak.before_bytes >= SIZE
