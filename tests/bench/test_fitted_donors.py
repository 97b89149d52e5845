"""What fitting donors costs."""

import pytest
import torch

from vlcache_fx.bench import fitted_donors as module
from vlcache_fx.bench.fitted_donors import FITTED, ONE, REFINE, main, measure, other_context
from vlcache_fx.store import Entry


def test_other_contexts_differ_in_keys_and_values() -> None:
    entry = Entry({"0.k": torch.ones(1, 6, 4), "residual": torch.ones(1, 6, 4)}, {"length": 6})
    first, second = other_context(entry, 1), other_context(entry, 2)
    assert torch.equal(first.tensors["residual"], entry.tensors["residual"])
    assert not torch.equal(first.tensors["0.k"], second.tensors["0.k"])
    assert first.info["contexts"] == ["1"]


def test_measure_and_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds, share = measure("tiny", 256, contexts=3, rank=8, budget=0.05, rounds=1)
    assert set(seconds) == {ONE, FITTED, REFINE}
    assert all(len(values) == 1 and values[0] > 0 for values in seconds.values())
    assert 1.0 < share <= 1.26
    monkeypatch.setattr(module, "measure", lambda *_, **__: (seconds, share))
    main("tiny", 256, 3, 8, 0.05, 1, "cpu", "float32")
    text = capsys.readouterr().out
    assert "fitted / one context" in text
    assert f"{share:.2f} of one context" in text
