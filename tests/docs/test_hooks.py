"""What tests read in a page is not shown; the glossary is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import vlcache_fx

from .blocks import ROOT


@pytest.fixture
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_on_page_markdown_hides_set_up_and_marks(hooks: ModuleType) -> None:
    page = '<!-- setup\na = 1\n-->\n```python {skip="no GPU"}\nb\n```\n'
    assert hooks.on_page_markdown(page, files=None) == "```python\nb\n```\n"


def test_on_page_markdown_brings_the_glossary(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contributing = tmp_path / "CONTRIBUTING.md"
    contributing.write_text(
        "# Contributing\n\n## Glossary\n\n| span | tokens |\n\n## How\n", encoding="utf-8"
    )
    monkeypatch.setattr(hooks, "CONTRIBUTING", contributing)
    page = "a\n<!-- glossary -->\nelsewhere\n<!-- glossary -->\nb\n"
    assert hooks.on_page_markdown(page) == "a\n| span | tokens |\n\nb\n"


def test_on_page_markdown_adds_the_public_names_that_a_page_leaves_out(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown("::: vlcache_fx.compile\n\n<!-- other public names -->\n")
    names = re.findall(r"^::: vlcache_fx\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted(set(vlcache_fx.__all__) - {"__version__"})
