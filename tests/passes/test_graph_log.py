"""``GraphLog``: graphs in a folder, in torch's logs and in its structured trace."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from torch._logging._internal import trace_log

from vlcache_fx.errors import OptionError
from vlcache_fx.passes.graph_log import GraphLog

from .programs import small

LOGGER = "vlcache_fx.passes.graph_log"


def show(root: Path | None = None) -> None:
    GraphLog("warm", root).show(2, "splice_rows", small()[0].graph_module)


def test_show_writes_code(tmp_path: Path) -> None:
    root = tmp_path / "not" / "there"
    show(root)
    show(root)
    files = sorted(root.rglob("*.py"))
    assert [str(path.relative_to(root)) for path in files] == [
        "0000_warm/02_splice_rows.py",
        "0001_warm/02_splice_rows.py",
    ]
    assert files[0].read_text(encoding="utf-8") == files[1].read_text(encoding="utf-8")
    assert "torch.ops.aten.scaled_dot_product_attention.default" in files[0].read_text(encoding="utf-8")


def test_show_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="option dump_graphs: cannot write to"):
        show(tmp_path / "file")


def test_show_logs_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        show()
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, LOGGER):
        show()
    (record,) = [one for one in caplog.records if one.name == LOGGER]
    assert "vlcache_warm_02_splice_rows" in record.getMessage()
    assert "scaled_dot_product_attention" in record.getMessage()


def test_show_traces_an_artifact() -> None:
    seen: list[Any] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record)

    handler, level = Collect(), trace_log.level
    trace_log.addHandler(handler)
    trace_log.setLevel(logging.DEBUG)
    try:
        show()
    finally:
        trace_log.removeHandler(handler)
        trace_log.setLevel(level)
    (record,) = [one for one in seen if "artifact" in one.metadata]
    assert record.metadata["artifact"] == {"name": "vlcache_warm_02_splice_rows", "encoding": "string"}
    assert "scaled_dot_product_attention" in record.payload
