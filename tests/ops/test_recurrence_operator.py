"""The operator ``vlcache.recur``: schema, strides, dtypes, symbolic sizes, gradients, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.ops.recurrences import KINDS, errors, inputs, recur, table
from vlcache_fx.ops import recur_reference


def all_arguments(rows: int, jumps: int, records: int, maps: int, batch: int = 2) -> dict[str, Tensor]:
    """Return a value for every argument; the last sample has padding."""
    points = torch.arange(jumps).clamp(max=rows).repeat(batch, 1)
    ends = torch.full((batch, records), rows)
    return inputs(rows, batch=batch) | {
        "jump_at": points,
        "jump_map": points % maps,
        "map_a": torch.eye(8).repeat(maps, 4, 1, 1),
        "map_b": torch.randn(maps, 4, 8, 6, generator=torch.Generator().manual_seed(1)),
        "start": ends.clamp(max=jumps),
        "end": ends,
        "num_rows": torch.arange(batch, 0, -1) * rows // batch,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("has_all", [False, True])
def test_recur_opcheck(kind: str, rows: int, has_all: bool) -> None:
    """Also that results share memory neither with inputs nor with each other, and no input is written to."""
    tensors = inputs(rows, kind=kind, batch=2)
    tensors = all_arguments(rows, 2, 3, 2) | tensors if has_all else tensors
    if kind not in ("delta", "kda"):
        tensors["beta"] = None
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(recur.default, (), {**tensors, "l2norm": True}, test_utils=checks)


@pytest.mark.parametrize("rows", [1, 70])
def test_recur_of_strided_inputs(rows: int) -> None:
    """A state of Mamba 2 is transposed, and q, k and v are slices of one tensor; results are contiguous."""
    tensors = inputs(rows, batch=2, heads=2, width=8)
    joined = torch.cat([tensors[name] for name in "qkv"], -1)
    strided = dict(zip("qkv", joined.split(8, -1), strict=True))
    strided["state"] = tensors["state"].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided["state"].is_contiguous()
    got, want = recur(**tensors | strided), recur(**tensors)
    assert max(errors(got, want)) < 1e-6
    assert all(result.is_contiguous() for result in got)
    torch.library.opcheck(recur.default, (), tensors | strided, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [1, 70])
def test_recur_under_autocast(rows: int) -> None:
    tensors = inputs(rows, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = recur(**tensors)
    assert max(errors(got, recur(**tensors))) == 0


@pytest.mark.parametrize("rows", [1, 7])
def test_recur_has_gradients(rows: int) -> None:
    tensors = {name: x.requires_grad_() for name, x in inputs(rows, dtype=torch.float64).items()}
    records = {"start": table([0]), "end": table([rows])} if rows > 1 else {}

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        found = recur(**dict(zip(tensors, values, strict=True)), **records)
        return tuple(result for result in found if result.numel())

    assert torch.autograd.gradcheck(results, tuple(tensors.values()))


def test_recur_compiles_for_all_sizes() -> None:
    """One graph serves other numbers of rows, jumps, maps and records."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(**tensors: Tensor) -> Any:
        return recur(**tensors)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for rows, jumps, records, maps in [(9, 2, 3, 4), (70, 5, 2, 3), (33, 3, 4, 2)]:
        tensors = all_arguments(rows, jumps, records, maps)
        for name, tensor in tensors.items():
            if name not in ("state", "num_rows"):
                torch._dynamo.mark_dynamic(tensor, 0 if name.startswith("map") else 1)
        assert max(errors(compiled(**tensors), recur(**tensors))) == 0
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_recur_on_a_gpu() -> None:
    tensors = {name: x.cuda() for name, x in all_arguments(200, 3, 2, 3).items()}
    got = recur(**tensors)
    want = recur_reference(**{name: x.cpu() for name, x in tensors.items()})
    assert max(errors([x.cpu() for x in got], want)) < 1e-4


@pytest.mark.gpu
def test_recur_with_the_kernel_of_fla() -> None:
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    tensors = inputs(200, dim=64, width=64, dtype=torch.bfloat16)
    tensors["state"], tensors["g"] = tensors["state"].float(), tensors["g"].float()
    got = recur(**{name: x.cuda() for name, x in tensors.items()}, l2norm=True)
    want = recur_reference(**tensors, l2norm=True)
    assert max(errors([x.cpu() for x in got], want)) < 2e-2
