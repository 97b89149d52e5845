"""``drop_merge_checks``: assertions about placeholders and features are dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.cleanup import DropMergeChecks

from ..programs import before_and_after, unchanged

aten = torch.ops.aten


def checked_merge(*, merges: bool = True, of_merge: bool = True) -> Program:
    """Return a program with a merge, and an assertion about the mask (or about another input)."""
    graph = fx.Graph()
    x, mask, features, other = (graph.placeholder(name) for name in ("x", "mask", "features", "other"))
    total = graph.call_function(aten.sum.default, (mask if of_merge else other,))
    number = graph.call_function(aten._local_scalar_dense.default, (total,))
    agrees = graph.call_function(torch.ops.aten.eq.Scalar, (total, 2))
    graph.call_function(aten._assert_scalar.default, (number, "they differ"))
    merged = graph.call_function(aten.masked_scatter.default, (x, mask, features)) if merges else x
    graph.output((merged, agrees))
    return Program(fx.GraphModule(torch.nn.Module(), graph))


INPUTS = (torch.zeros(4), torch.tensor([False, True, True, False]), torch.ones(2), torch.ones(1))


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("drop_merge_checks", before_and_after(DropMergeChecks(), checked_merge()))


def test_numbers() -> None:
    program = checked_merge()
    Pipeline((DropMergeChecks(),)).run(program)
    merged, _ = program.graph_module(*INPUTS)
    assert merged.tolist() == [0, 1, 1, 0]
    assert "local_scalar" not in str(program.graph)  # no number is read from a tensor


def test_keeps_other_checks() -> None:
    assert unchanged(DropMergeChecks(), checked_merge(of_merge=False))
    assert unchanged(DropMergeChecks(), checked_merge(merges=False))
