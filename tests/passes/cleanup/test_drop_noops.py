"""``drop_noops``: nodes that compute nothing are dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.passes import Program
from vlcache_fx.passes.cleanup import DropNoops

from ..programs import before_and_after, unchanged
from .graphs import program_of

X = torch.arange(6.0).reshape(3, 2)
aten = torch.ops.aten


def identities(x: Tensor) -> tuple[Tensor]:
    y = aten.alias(aten.detach(x) + 1)
    aten._assert_tensor_metadata(y, dtype=torch.float32)
    return (aten.slice(y, 0, 0, 2**63 - 1) * aten.lift_fresh_copy(x),)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("drop_noops", before_and_after(DropNoops(), program_of(identities, X)))


def test_numbers() -> None:
    program = program_of(identities, X)
    DropNoops().run(program)
    program.graph_module.recompile()
    assert torch.equal(program.graph_module(X)[0], identities(X)[0])


def test_drops_slices_of_all_last_entries() -> None:
    """``x[-tokens:]``, as caches write it: behind no earlier tokens, it is the whole."""

    def last_entries(x: Tensor) -> tuple[Tensor]:
        return (x[-x.shape[0] :] * 2,)

    for mode in ("fake", "symbolic"):
        module = make_fx(last_entries, tracing_mode=mode, pre_dispatch=True)(X)
        program = Program(module)
        assert DropNoops().run(program)
        assert not program.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
        module.recompile()
        assert torch.equal(module(X)[0], X * 2)


def test_keeps_slices_of_fewer_last_entries() -> None:
    def last_entries(x: Tensor) -> tuple[Tensor, ...]:
        return x[-x.shape[0] + 1 :] * 2, x[-x.shape[1] :] * 2, x[-2:] * 2, x[-x.shape[0] :: 2] * 2

    for mode in ("fake", "symbolic"):
        module = make_fx(last_entries, tracing_mode=mode, pre_dispatch=True)(X)
        program = Program(module)
        DropNoops().run(program)
        assert len(program.graph.find_nodes(op="call_function", target=aten.slice.Tensor)) == 4


def test_keeps_computing_nodes() -> None:
    def computing(x: Tensor) -> tuple[Tensor]:
        return (x[1:].clone() + x[::2] + x[:-1],)

    def only_slices(x: Tensor) -> tuple[Tensor]:
        return (aten.slice(x, 0, 1, 2**63 - 1) + aten.slice(x, 0, 0, 2),)

    assert unchanged(DropNoops(), program_of(only_slices, X))
    program = program_of(computing, X)
    DropNoops().run(program)
    program.graph_module.recompile()
    assert torch.equal(program.graph_module(X)[0], computing(X)[0])
