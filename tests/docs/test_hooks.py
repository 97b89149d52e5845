"""What tests read in a page is not shown."""

from __future__ import annotations

import importlib.util

from .blocks import ROOT


def test_on_page_markdown_hides_set_up_and_marks() -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = '<!-- setup\na = 1\n-->\n```python {skip="no GPU"}\nb\n```\n'
    assert hooks.on_page_markdown(page, files=None) == "```python\nb\n```\n"
