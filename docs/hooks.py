"""Hooks of mkdocs: what tests read in a page is not shown."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = re.compile(r"^<!-- setup\n.*?^-->\n", re.MULTILINE | re.DOTALL)
"""Code that runs before the blocks of a page, see ``tests/docs/blocks.py``."""

MARK = re.compile(r"^(```python) \{[^\n]*\}$", re.MULTILINE)
"""A block that tests do not run, and the reason."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page without hidden code and marks of blocks."""
    return MARK.sub(r"\1", HIDDEN.sub("", markdown))
