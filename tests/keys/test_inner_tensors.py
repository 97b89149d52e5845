"""Fingerprints of composite weights: complete, quick to detect changes, or refused."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlcache_fx.errors import UnreadableWeightsError
from vlcache_fx.keys import WeightsFingerprint
from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.watch import TensorWatch

from ..store.scaled import Scaled


class Packed(nn.Parameter):
    """Packed bytes, and a state that describes their meaning."""

    state: Any


class State:
    def __init__(self, scale: float) -> None:
        self.scales, self.block = torch.full((4,), scale), 64


def packed(scale: float = 1.0) -> Tensor:
    made = Packed(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    made.state = State(scale)
    return made


def scaled(scale: float = 1.0, zero: int = 0) -> Scaled:
    values = torch.arange(512, dtype=torch.int32).to(torch.int8).view(16, 32)
    return Scaled(values, torch.full((16, 1), scale), zero)


def sparse(value: float = 1.0, form: str = "coo") -> Tensor:
    dense = torch.zeros(4, 6)
    dense[1, 2], dense[3, 0] = value, 2.0
    return dense.to_sparse_coo() if form == "coo" else dense.to_sparse_csr()


def quantised(scale: float = 0.1, zero: int = 0) -> Tensor:
    return torch.quantize_per_tensor(torch.arange(6.0), scale, zero, torch.qint8)


MAKERS: dict[str, Callable[[], list[Tensor]]] = {
    "wrapper": lambda: [scaled(), scaled(2.0), scaled(1.0, 1)],
    "a wrapper in a parameter": lambda: [nn.Parameter(scaled(s), requires_grad=False) for s in (1.0, 2.0)],
    "a wrapper in a wrapper": lambda: [
        Scaled(torch.ones(16, 32, dtype=torch.int8), scaled(s)) for s in (1.0, 2.0)
    ],
    "packed bytes": lambda: [packed(), packed(2.0)],
    "coo": lambda: [sparse(), sparse(3.0)],
    "csr": lambda: [sparse(form="csr"), sparse(3.0, "csr")],
    "qint8": lambda: [quantised(), quantised(0.2), quantised(0.1, 3)],
    "nested": lambda: [
        torch.nested.nested_tensor([torch.ones(2, 3), torch.full((4, 3), v)], layout=torch.jagged)
        for v in (1.0, 2.0)
    ],
}


def fingerprint(tensor: Tensor) -> str:
    return WeightsFingerprint([tensor]).current([tensor])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_fingerprint_of_composite_tensors(make: Callable[[], list[Tensor]]) -> None:
    first, second = [fingerprint(one) for one in make()], [fingerprint(one) for one in make()]
    assert first == second
    assert len(set(first)) == len(first)


def test_fingerprint_includes_the_structure() -> None:
    weight = scaled()
    assert fingerprint(weight) not in (fingerprint(weight.plain()), fingerprint(weight.values_))
    assert WeightsFingerprint([weight.values_, weight.scale]).current(
        [weight.values_, weight.scale]
    ) != fingerprint(weight)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a scale": lambda w: w.scale.mul_(2),
    "a scale through data": lambda w: w.scale.data.mul_(2),
    "a value": lambda w: w.values_[3, 4].add_(1),
    "another scale": lambda w: setattr(w, "scale", w.scale * 2),
    "the zero point": lambda w: setattr(w, "zero", 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_watch_detects_changes_of_inner_tensors(change: Callable[[Any], Any]) -> None:
    weight = scaled()
    follow, watch = WeightsFingerprint([weight]), TensorWatch([weight])
    before = follow.current([weight])
    assert watch.unchanged([weight])
    change(weight)
    assert not watch.unchanged([weight])
    assert follow.current([weight]) != before
    assert follow.current([weight]) == fingerprint(weight)


def test_watch_detects_changes_of_attributes() -> None:
    weight = packed()
    watch = TensorWatch([weight])
    weight.state.scales[1] = 5.0  # type: ignore[attr-defined]
    assert not watch.unchanged([weight])


class Opaque(Tensor):
    """A wrapper subclass without ``__tensor_flatten__``."""

    @staticmethod
    def __new__(cls) -> Opaque:
        return Tensor._make_wrapper_subclass(cls, (2, 3))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def meta() -> Tensor:
    return torch.empty(2, device="meta")


@pytest.mark.parametrize("make", [meta, lambda: nn.Parameter(meta()), Opaque, fake])
def test_leaves_of_rejects_unreadable_tensors(make: Callable[[], Tensor]) -> None:
    with pytest.raises(UnreadableWeightsError) as raised:
        leaves_of([torch.ones(1), make()])
    assert "\n" not in str(raised.value)
    with pytest.raises(UnreadableWeightsError):
        WeightsFingerprint([make()])


def test_leaves_of_rejects_functorch_wrappers() -> None:
    seen = []

    def look(tensor: Tensor) -> Tensor:
        with pytest.raises(UnreadableWeightsError, match="transform"):
            leaves_of([tensor])
        seen.append(True)
        return tensor

    torch.vmap(look)(torch.ones(2, 3))
    assert seen


def test_watch_keeps_no_memory_of_dead_tensors() -> None:
    tensors = [torch.ones(1000), torch.ones(10)]
    watch, follow = TensorWatch(tensors), WeightsFingerprint(tensors)
    before = follow.current(tensors)
    rest = tensors.pop()
    tensors.clear()
    gc.collect()
    assert not watch._views
    assert not watch._samples
    assert not watch.unchanged([rest])
    assert follow.current([torch.ones(1000), rest]) == before
