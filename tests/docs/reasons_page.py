"""The tables of reasons in the manual: the texts of ``vlcache_fx.Reason``, with links."""

from __future__ import annotations

import re

from vlcache_fx.reasons import Reason, Scope

from .blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"

LINKS = {
    "mark the spans": "torch-compile.md#mark-spans-yourself",
    "a rule": "extend.md#a-model-family",
    "the page about recurrent layers": "recurrent-layers.md",
    "Guards": "fidelity.md#shadow-runs",
}
"""Words of advice, and the places of the manual that they lead to; each occurs in one piece of advice."""


def table_of(scope: Scope) -> str:
    """The table of the reasons of graphs, calls or spans."""
    rows = [_row(reason) for reason in Reason if reason.scope == scope]
    return "\n".join(["| value | meaning | do |", "|---|---|---|", *rows])


def _row(reason: Reason) -> str:
    meaning = f"{reason.text}. {reason.more}" if reason.more else reason.text
    advice = reason.advice
    for words, target in LINKS.items():
        advice = re.sub(rf"\b{words}\b", f"[{words}]({target})", advice)
    return f"| `{reason.value}` | {meaning} | {advice} |"


def with_tables(page: str) -> str:
    """The page with the tables of now: each is between two comments that name its scope.

    Raises:
        ValueError: a scope has no place.
    """
    for scope in ("graph", "call", "span"):
        begin, end = f"<!-- reasons of a {scope}: begin -->\n", f"<!-- reasons of a {scope}: end -->\n"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page has no place for the reasons of a {scope}")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table_of(scope)}\n\n{end}{rest.split(end)[1]}"
    return page
