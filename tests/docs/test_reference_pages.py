"""Pages that list names of the code list all of them."""

from __future__ import annotations

import re
from dataclasses import fields

from vlcache_fx.errors import Reason
from vlcache_fx.options import Options
from vlcache_fx.policies import known_policies

from .blocks import ROOT

DOCS = ROOT / "docs"


def first_cells(page: str) -> list[str]:
    """The code spans in the first cells of the page's tables."""
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [name for cell in rows for name in re.findall(r"`([^`]*)`", cell)]


def test_troubleshooting_has_one_entry_for_each_reason() -> None:
    values = [reason.value for reason in Reason]
    listed = first_cells("troubleshooting.md")
    assert [value for value in values if listed.count(value) != 1] == []


def test_options_has_a_row_for_each_option() -> None:
    assert {option.name for option in fields(Options)} <= set(first_cells("options.md"))


def test_policies_has_a_row_for_each_policy() -> None:
    own = [name for name, entry in known_policies().items() if entry.value.startswith("vlcache_fx.")]
    assert set(own) <= set(first_cells("policies.md"))
