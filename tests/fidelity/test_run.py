"""Policies and budgets compared on the reference model."""

from vlcache_fx.fidelity.compare import Interval
from vlcache_fx.fidelity.plot import pareto
from vlcache_fx.fidelity.run import ALL, Score, settings


def test_settings_none_and_full() -> None:
    chosen = settings(["uniform", "first_k"], (0.0, 0.1, 1.0))
    assert [(one.name, one.budget) for one in chosen] == [
        ("none", 0.0), ("uniform", 0.1), ("first_k", 0.1), ("full", 1.0)
    ]  # fmt: skip


def test_settings_with_donor_dtypes() -> None:
    chosen = settings(["uniform"], (0.1,), donor_dtypes=("model", "int8"))
    assert [one.label for one in chosen] == ["uniform", "uniform, int8"]
    assert [one.label for one in settings(["uniform"], (0.1,))] == ["uniform"]


def test_pareto_front() -> None:
    certain = Interval(1.0, 1.0, 1.0)

    def score(recomputed: float, kl: float) -> Score:
        return Score("p", 0.1, ALL, 1, recomputed, certain, certain, certain, Interval(kl, kl, kl))

    worst, cheap, good, dominated = score(0.0, 3.0), score(0.1, 2.0), score(0.3, 1.0), score(0.2, 2.5)
    assert pareto([good, dominated, cheap, worst]) == [worst, cheap, good]
