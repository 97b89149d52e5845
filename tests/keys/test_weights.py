"""The fingerprint follows every change of the weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.keys import WeightsFingerprint, weights
from vlcache_fx.keys.weights import device_checksum


def make(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(64, 32), (32,), (), (0, 3), (5, 7)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def fingerprint(tensors: list[Tensor]) -> str:
    return WeightsFingerprint(tensors).current(tensors)


def test_the_same_values_elsewhere_have_the_same_fingerprint() -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint([nn.Parameter(tensor) for tensor in make()]) == fingerprint(make())
    transposed = make()
    transposed[0] = transposed[0].t().contiguous().t()
    assert fingerprint(transposed) == fingerprint(make())


def test_order_type_and_shape_matter() -> None:
    tensors = make()
    prints = {
        fingerprint(tensors),
        fingerprint(tensors[::-1]),
        fingerprint(tensors[:-1]),
        fingerprint([tensors[0].reshape(32, 64), *tensors[1:]]),
        fingerprint(make(torch.float64)),
        fingerprint(make(torch.bfloat16)),
        fingerprint([]),
    }
    assert len(prints) == 7


CHANGES: dict[str, Callable[[list[Tensor]], object]] = {
    "in place, one value": lambda t: t[0].__setitem__((17, 5), 3.0),
    "in place, a row": lambda t: t[0][3].zero_(),
    "data, scaled": lambda t: t[0].data.mul_(1.0001),
    "data, negated": lambda t: t[0].data.neg_(),
    "data, flipped": lambda t: t[0].data.copy_(t[0].data.flip(0)),
    "data, a small tensor": lambda t: t[4].data.view(-1)[-1:].add_(1),
    "data, a scalar": lambda t: t[2].data.fill_(9.0),
    "data, replaced": lambda t: setattr(t[1], "data", torch.ones(32)),
    "tensor replaced": lambda t: t.__setitem__(1, torch.ones(32)),
    "tensor appended": lambda t: t.append(torch.ones(1)),
    "tensors swapped": lambda t: t.reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_are_noticed(change: Callable[[list[Tensor]], object]) -> None:
    tensors = make()
    before = WeightsFingerprint(tensors)
    first = before.current(tensors)
    change(tensors)
    changed = before.current(tensors)
    assert changed != first
    assert changed == fingerprint([tensor.detach().clone() for tensor in tensors])


def test_changing_back_brings_the_fingerprint_back() -> None:
    tensors = make()
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    saved = tensors[0].clone()
    tensors[0].data.zero_()
    assert follow.current(tensors) != first
    tensors[0].data.copy_(saved)
    assert follow.current(tensors) == first


def test_nan_is_equal_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((3,), float("nan"))]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    monkeypatch.setattr(weights, "content_digest", lambda _, **_settings: "read again")
    assert follow.current(tensors) == first


def test_all_bytes_are_read_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make()
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    monkeypatch.setattr(weights, "content_digest", lambda _, **_settings: "read again")
    assert follow.current(tensors) == follow.current(list(tensors)) == first
    follow.invalidate()
    assert follow.current(tensors) == "read again"


def test_invalidate_helps_where_samples_do_not_look() -> None:
    tensors = [torch.zeros(1000, 1000)]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    tensors[0].data[0, 500] = 1.0
    follow.invalidate()
    assert follow.current(tensors) != first


def test_inference_tensors_are_followed_too() -> None:
    with torch.inference_mode():
        tensors = [torch.zeros(4)]
        follow = WeightsFingerprint(tensors)
        first = follow.current(tensors)
        assert follow.current(tensors) == first
        tensors[0].add_(1)
        assert follow.current(tensors) != first


@pytest.mark.parametrize("step", [37, 4096])
def test_more_tensors_than_are_compared_in_one_go(step: int) -> None:
    tensors = [torch.full((step,), float(i)) for i in range(300)]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    assert follow.current(tensors) == first
    tensors[251].data.add_(1)
    assert follow.current(tensors) != first


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.complex64, torch.complex128]
)
def test_checksums_follow_values_and_their_order(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(40).reshape(5, 8).to(dtype)
    first = device_checksum(values)
    assert device_checksum(values.t().contiguous().t()) == first
    assert device_checksum(values.flip(0)) != first
    assert device_checksum(-values) != first
    changed = values.clone()
    changed[2, 3] += 1
    assert device_checksum(changed) != first
    monkeypatch.setattr(weights, "_CHUNK", 7)  # the values, not how they are read
    assert device_checksum(values) == first


def test_checksums_have_no_simple_collisions() -> None:
    zeros = torch.zeros(64)
    sums = {device_checksum(zeros)}
    for i in range(64):
        changed = zeros.clone()
        changed[i] = -0.0
        sums.add(device_checksum(changed))
    assert len(sums) == 65


@pytest.mark.gpu
def test_weights_on_a_gpu() -> None:
    tensors = [tensor.cuda() for tensor in make()]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    assert first == fingerprint([tensor.clone() for tensor in tensors])
    tensors[0].data.neg_()
    assert follow.current(tensors) != first
