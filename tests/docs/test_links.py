"""Links of the front page lead somewhere. Those within the manual are checked when it is built."""

from __future__ import annotations

import re

import pytest

from .blocks import ROOT

LINKS = re.findall(r"\]\((?!https?://)([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as the manual and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("link", sorted(set(LINKS)))
def test_links_of_the_front_page(link: str) -> None:
    name, _, anchor = link.partition("#")
    path = ROOT / name
    assert path.is_file()
    assert not anchor or anchor in anchors(path.read_text(encoding="utf-8"))
