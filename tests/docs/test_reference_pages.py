"""Pages that list names of the code list all of them."""

from __future__ import annotations

import re
from dataclasses import fields

from vlcache_fx.errors import Reason
from vlcache_fx.integrations.metric_families import FAMILIES
from vlcache_fx.options import Options
from vlcache_fx.policies import known_policies
from vlcache_fx.runtime.donors.differences import WORDS

from .blocks import ROOT

DOCS = ROOT / "docs"
UNLISTED = {"encoder", "dtype or numeric mode of the encoder"}  # clear without a row


def first_cells(page: str) -> list[str]:
    """The code spans in the first cells of the page's tables."""
    rows = re.findall(r"^\| ([^|]*) \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return [name for cell in rows for name in re.findall(r"`([^`]*)`", cell)]


def test_troubleshooting_has_one_entry_for_each_reason() -> None:
    values = [reason.value for reason in Reason]
    listed = first_cells("troubleshooting.md")
    assert [value for value in values if listed.count(value) != 1] == []


def test_troubleshooting_has_the_advice_of_reasons() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| `([a-z_]+)` \| [^\n]* \| ([^|\n]*) \|$", text, re.MULTILINE))
    advice = {value: re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell) for value, cell in cells.items()}
    assert {reason.value: advice.get(reason.value) for reason in Reason} == {
        reason.value: reason.advice for reason in Reason
    }


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
