"""Source lines in refusals."""

from __future__ import annotations

import pytest
from torch.fx import Graph

from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse, source_line, without_folders

TRACE = """
  File "/site/torch/nn/functional.py", line 3, in outer
    return inner(x)
  File "/home/me/model.py", line 12, in forward
    x = x.flip(1)
"""


def test_source_line_innermost() -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = TRACE
    assert source_line(node) == '"/home/me/model.py", line 12, in forward: x = x.flip(1)'
    error = refuse(Reason.UNKNOWN_OP, node, "not known.")
    assert (error.reason, error.node, error.source_line) == (Reason.UNKNOWN_OP, "x", source_line(node))
    assert str(error).startswith("graph not supported [unknown_op]: not known (at node 'x', from")


@pytest.mark.parametrize("trace", [None, "", "no file in it"])
def test_source_line_without_trace(trace: str | None) -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = trace
    assert source_line(node) is None


def test_source_line_without_code() -> None:
    node = Graph().placeholder("x")
    node.meta["stack_trace"] = 'File "model.py", line 1, in forward'
    assert source_line(node) == '"model.py", line 1, in forward'


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ('from "/home/me/model.py", line 12: x = "a/b"', 'from "model.py", line 12: x = "a/b"'),
        (r'"C:\me\model.py", line 1, and "/x/y.py", line 2', '"model.py", line 1, and "y.py", line 2'),
        ('"model.py", line 1', '"model.py", line 1'),
        ("", ""),
        (None, None),
    ],
)
def test_without_folders(text: str | None, rest: str | None) -> None:
    assert without_folders(text) == rest


def test_refuse_without_node() -> None:
    error = refuse(Reason.NO_ATTENTION, None, "none")
    assert (error.node, error.source_line) == (None, None)
