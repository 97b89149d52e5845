"""Pages that list names of the code list all of them."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from vlcache_fx.errors import Reason
from vlcache_fx.integrations.metric_families import FAMILIES
from vlcache_fx.options import Options
from vlcache_fx.policies import known_policies
from vlcache_fx.runtime.donors.differences import WORDS

from .blocks import ROOT
from .reasons_page import LINKS, PAGE, with_tables

DOCS = ROOT / "docs"
UNLISTED = {"encoder", "dtype or numeric mode of the encoder"}  # clear without a row


def first_cells(page: str) -> list[str]:
    """The code spans in the first cells of the page's tables."""
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [name for cell in rows for name in re.findall(r"`([^`]*)`", cell)]


def test_troubleshooting_has_the_reasons_of_now(request: pytest.FixtureRequest) -> None:
    """After a change of ``Reason``: ``pytest --update-golden``."""
    page = PAGE.read_text(encoding="utf-8")
    if request.config.getoption("--update-golden"):
        PAGE.write_text(with_tables(page), encoding="utf-8")
        return
    assert page == with_tables(page)
    assert [value for value in Reason if first_cells("troubleshooting.md").count(value) != 1] == []


def test_with_tables_needs_a_place_for_each_scope() -> None:
    with pytest.raises(ValueError, match="no place for the reasons of a graph"):
        with_tables("a page without comments")


def test_links_are_in_one_piece_of_advice_each() -> None:
    counts = {words: sum(words in reason.advice for reason in Reason) for words in LINKS}
    assert counts == dict.fromkeys(LINKS, 1)


def test_metrics_has_a_row_for_each_metric() -> None:
    names = [f"{family.name}_total" if family.is_counter else family.name for family in FAMILIES]
    listed = first_cells("metrics.md")
    assert [name for name in names if listed.count(name) != 1] == []


def test_troubleshooting_has_the_words_of_explanations() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    of_donors = {
        word for part, word in WORDS.items() if part not in ("content", "encoder.modality", "modality")
    }
    assert {word for word in of_donors if f"`{word}`" not in text} <= UNLISTED


def test_options_has_a_row_for_each_option() -> None:
    assert {option.name for option in fields(Options)} <= set(first_cells("options.md"))


def test_policies_has_a_row_for_each_policy() -> None:
    own = [name for name, entry in known_policies().items() if entry.value.startswith("vlcache_fx.")]
    assert set(own) <= set(first_cells("policies.md"))
