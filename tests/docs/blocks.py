"""The Python blocks of a page, as they run in order.

A page is one session: each block sees the names of those before it. Code in a comment that begins with
``<!-- setup`` runs too and is not shown. A block whose fence reads ``python {skip="reason"}`` does not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

HIDDEN = r"<!-- setup\n(?P<hidden>.*?)^-->"
SHOWN = r"```python(?: \{skip=\"(?P<skip>[^\"\n]+)\"\})?\n(?P<shown>.*?)^```"
BLOCK = re.compile(f"^(?:{HIDDEN}|{SHOWN})$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^[ >]*```py.*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Attributes:
        code: Python.
        line: its first line in the page.
        skip: why it does not run; None where it does.
    """

    code: str
    line: int
    skip: str | None

    def compiled(self, page: Path) -> CodeType:
        """The code; errors in it name the page and the line."""
        return compile("\n" * (self.line - 1) + self.code, str(page), "exec")


def blocks(text: str) -> list[Block]:
    """The blocks of a page, those of its set-up included.

    Raises:
        ValueError: a fence of Python is not written as this module reads it.
    """
    found = []
    for match in BLOCK.finditer(text):
        group = "shown" if match["shown"] is not None else "hidden"
        line = text.count("\n", 0, match.start(group)) + 1
        found.append(Block(match[group], line, match["skip"]))
    fences = FENCE.findall(text)
    shown = sum(match["shown"] is not None for match in BLOCK.finditer(text))
    if len(fences) != shown:
        raise ValueError(f"{len(fences)} fences of Python, of which {shown} are read: {fences}")
    return found
