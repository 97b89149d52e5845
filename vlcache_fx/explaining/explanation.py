"""The explanation of one call, with its renderings."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path

from rich.console import Group, RenderableType

from vlcache_fx.explaining.explained_call import ExplainedCall
from vlcache_fx.explaining.graph_text import layer_text
from vlcache_fx.explaining.page import page
from vlcache_fx.explaining.text import text


class Explanation(ExplainedCall):
    """What becomes of one call, and why: ``ExplainedCall`` as JSON, as a page and as text.

    It renders itself in a notebook and, with ``rich.print``, on a terminal.
    """

    def to_json(self) -> str:
        """Return ``as_dict`` as one JSON object."""
        return json.dumps(self.as_dict(), ensure_ascii=False)

    def to_html(self) -> str:
        """Return one page that needs nothing else: no scripts, fonts or files."""
        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def layers(self) -> RenderableType:
        """Render one layer of each graph before and after the passes, as a diff for ``rich.print``."""
        return Group(*map(layer_text, self.graphs))

    def __rich__(self) -> RenderableType:
        """Render the explanation for a terminal."""
        return text(self)

    def _repr_html_(self) -> str:
        """Render the page in a frame of its own, for notebooks."""
        escaped = html.escape(self.to_html(), quote=True)
        style = "width:100%;height:900px;border:0"
        return f'<iframe srcdoc="{escaped}" style="{style}" title="explanation"></iframe>'
