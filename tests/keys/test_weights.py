"""Weight fingerprints detect every change."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.keys import WeightsFingerprint, weights


def make(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(64, 32), (32,), (), (0, 3), (5, 7)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def fingerprint(tensors: list[Tensor]) -> str:
    return WeightsFingerprint(tensors).current(tensors)


def test_fingerprint_of_equal_values() -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint([nn.Parameter(tensor) for tensor in make()]) == fingerprint(make())
    transposed = make()
    transposed[0] = transposed[0].t().contiguous().t()
    assert fingerprint(transposed) == fingerprint(make())


def test_fingerprint_depends_on_order_dtype_and_shape() -> None:
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
def test_fingerprint_detects_changes(change: Callable[[list[Tensor]], object]) -> None:
    tensors = make()
    before = WeightsFingerprint(tensors)
    first = before.current(tensors)
    change(tensors)
    changed = before.current(tensors)
    assert changed != first
    assert changed == fingerprint([tensor.detach().clone() for tensor in tensors])


def test_fingerprint_after_a_reverted_change() -> None:
    tensors = make()
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    saved = tensors[0].clone()
    tensors[0].data.zero_()
    assert follow.current(tensors) != first
    tensors[0].data.copy_(saved)
    assert follow.current(tensors) == first


def test_fingerprint_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((3,), float("nan"))]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    monkeypatch.setattr(weights, "content_digest", lambda _, **_settings: "read again")
    assert follow.current(tensors) == first


def test_fingerprint_reads_all_bytes_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make()
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    monkeypatch.setattr(weights, "content_digest", lambda _, **_settings: "read again")
    assert follow.current(tensors) == follow.current(list(tensors)) == first
    follow.invalidate()
    assert follow.current(tensors) == "read again"


def test_invalidate_after_a_write_between_samples() -> None:
    tensors = [torch.zeros(1000, 1000)]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    tensors[0].data[0, 500] = 1.0
    follow.invalidate()
    assert follow.current(tensors) != first


def test_fingerprint_of_inference_tensors() -> None:
    with torch.inference_mode():
        tensors = [torch.zeros(4)]
        follow = WeightsFingerprint(tensors)
        first = follow.current(tensors)
        assert follow.current(tensors) == first
        tensors[0].add_(1)
        assert follow.current(tensors) != first


@pytest.mark.parametrize("step", [37, 4096])
def test_fingerprint_of_several_groups(step: int) -> None:
    tensors = [torch.full((step,), float(i)) for i in range(300)]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    assert follow.current(tensors) == first
    tensors[251].data.add_(1)
    assert follow.current(tensors) != first


def test_fingerprint_format_is_stable() -> None:
    # Fingerprints are parts of stored keys, profiles and manifests.
    tensors = [torch.arange(6.0).reshape(2, 3), torch.arange(1 << 17, dtype=torch.float32)]
    assert fingerprint(tensors) == "41b173375cf7abbb5c22cc21b4b043614e95154cfd2ec368edefa7bcaefe6211"


@pytest.mark.gpu
def test_fingerprint_on_gpu_is_that_on_the_cpu() -> None:
    tensors = [*make(), torch.randn(700, 333, dtype=torch.bfloat16), torch.randn(1 << 17)]
    assert fingerprint([tensor.cuda() for tensor in tensors]) == fingerprint(tensors)


@pytest.mark.gpu
def test_fingerprint_on_gpu() -> None:
    tensors = [tensor.cuda() for tensor in make()]
    follow = WeightsFingerprint(tensors)
    first = follow.current(tensors)
    assert first == fingerprint([tensor.clone() for tensor in tensors])
    tensors[0].data.neg_()
    assert follow.current(tensors) != first
