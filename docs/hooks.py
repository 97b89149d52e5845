"""Hooks of mkdocs: hide what only tests read, bring CONTRIBUTING.md's glossary, complete the API page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import vlcache_fx

HIDDEN = re.compile(r"^<!-- setup\n.*?^-->\n", re.MULTILINE | re.DOTALL)
"""Code that runs before the blocks of a page, see ``tests/docs/blocks.py``."""

MARK = re.compile(r"^(```python) \{[^\n]*\}$", re.MULTILINE)
"""A block that tests do not run, and the reason."""

GLOSSARY = re.compile(r"^<!-- glossary -->\n.*?^<!-- glossary -->\n", re.MULTILINE | re.DOTALL)
"""The place of the glossary in its page."""

SECTION = re.compile(r"^## Glossary\n\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)

OTHERS = "<!-- other public names -->\n"
"""The place of the public names that the page before it does not have."""

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page as readers see it."""
    section = SECTION.search(CONTRIBUTING.read_text(encoding="utf-8"))
    if section is not None:
        markdown = GLOSSARY.sub(lambda _: section[1], markdown)
    if OTHERS in markdown:
        listed = set(re.findall(r"^::: vlcache_fx\.(\w+)$", markdown, re.MULTILINE))
        others = [name for name in vlcache_fx.__all__ if name not in listed and not name.startswith("_")]
        markdown = markdown.replace(OTHERS, "\n".join(f"::: vlcache_fx.{name}\n" for name in others))
    return MARK.sub(r"\1", HIDDEN.sub("", markdown))
