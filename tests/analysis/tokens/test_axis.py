"""Entries of token axes."""

from __future__ import annotations

import sympy

from vlcache_fx.analysis.tokens.axis import Entries, TokenAxis

S = sympy.Symbol("s", integer=True, positive=True)


def test_entries_are_tokens() -> None:
    order = sympy.Symbol("sort")  # any object: only its identity counts
    assert Entries().are_tokens
    for entries in (Entries(outer=2), Entries(inner=S), Entries(order=order)):  # type: ignore[arg-type]
        assert not entries.are_tokens
        assert not entries.same(Entries())
        assert entries.same(entries)
    assert Entries(outer=2 * S).same(Entries(outer=S + S))
    assert not Entries(outer=2).same(Entries(inner=2))
    assert TokenAxis(1, Entries(2)).moved(0) == TokenAxis(0, Entries(2))
    assert TokenAxis(1, points_at=Entries(2)).at(0) == TokenAxis(0)
