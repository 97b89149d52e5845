"""The code in the manual and on the front page runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlcache_fx.options import Options

from ..runtime.helpers import own_compiler_state
from .blocks import PAGES, ROOT, Block, blocks

WITH_CODE = [page for page in PAGES if any(block.skip is None for block in blocks(page.read_text("utf-8")))]


@pytest.fixture
def eager_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages do not name a lowering: Inductor takes longer to compile their models than all pages take to run.

    Nor ``dynamic``: with symbolic lengths from the first call on, every graph is compiled once.
    """
    parse = Options.parse.__func__  # type: ignore[attr-defined]

    def eager(cls: type[Options], mapping: Any = None) -> Options:
        options: Options = parse(cls, {"lowering": "eager", "dynamic": True, **(mapping or {})})
        return options

    monkeypatch.setattr(Options, "parse", classmethod(eager))
    with own_compiler_state():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("eager_kernels")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # those of other libraries about their own defaults
        torch.manual_seed(0)
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.skip is None:
                exec(block.compiled(page), names)


def test_blocks_reads_code_set_up_and_reasons() -> None:
    text = '<!-- setup\na = 1\n-->\ntext\n```python\nb = a\n```\n```python {skip="no GPU"}\nc\n```\n'
    assert blocks(text) == [Block("a = 1\n", 2, None), Block("b = a\n", 6, None), Block("c\n", 9, "no GPU")]


def test_blocks_refuses_a_fence_that_it_does_not_read() -> None:
    with pytest.raises(ValueError, match="1 fences of Python, of which 0"):
        blocks('```python linenums="1"\na\n```\n')


def test_pages_are_found() -> None:
    assert ROOT / "README.md" in PAGES
    assert len(PAGES) > 10
