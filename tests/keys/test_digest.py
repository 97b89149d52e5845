"""Content digests: equal for equal parts, different for different parts."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from vlcache_fx.errors import StoreError
from vlcache_fx.keys import content_digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
]

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
parts = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple), max_leaves=8
)


def typed(part: Any) -> Any:
    """Return a form for which ``==`` distinguishes what digests distinguish."""
    if isinstance(part, list | tuple):
        return (type(part), [typed(item) for item in part])
    if isinstance(part, float):
        return (float, math.copysign(1, part), part)
    return (type(part), part)


@given(st.lists(parts, max_size=4), st.lists(parts, max_size=4))
def test_content_digest_equal_only_for_equal_parts(left: list[Any], right: list[Any]) -> None:
    assert (content_digest(left) == content_digest(right)) == (typed(left) == typed(right))
    assert content_digest(left) == content_digest(list(left))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["a"], [b"a"]),
        ([1], [True]),
        ([1], [1.0]),
        ([0.0], [-0.0]),
        ([0], [None]),
        ([], [None]),
        ([()], [[]]),
        ([(1, 2)], [1, 2]),
        ([(1,), 2], [(1, 2)]),
        ([""], [b""]),
        ([255], [-1]),
        ([2**64], [0]),
        ([torch.arange(2)], [(0, 1)]),
        ([torch.zeros(30, 150)], [torch.zeros(150, 30)]),
        ([torch.zeros(4)], [torch.zeros(4, 1)]),
        ([torch.zeros(0, 3)], [torch.zeros(3, 0)]),
        ([torch.zeros(())], [torch.zeros(1)]),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.int32)]),
        ([torch.zeros(2), torch.ones(2)], [torch.ones(2), torch.zeros(2)]),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(4)]),
        ([torch.tensor([0.0])], [torch.tensor([-0.0])]),
        ([torch.zeros(2, dtype=torch.float16)], [torch.zeros(2, dtype=torch.bfloat16)]),
    ],
)
def test_content_digest_of_similar_parts(left: list[Any], right: list[Any]) -> None:
    assert content_digest(left) != content_digest(right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_content_digest_of_tensor_values(dtype: torch.dtype) -> None:
    values = torch.arange(24).reshape(4, 6).remainder(3).to(dtype)
    same = content_digest([values])
    assert content_digest([values.clone()]) == same
    assert content_digest([values.t().contiguous().t()]) == same
    assert content_digest([torch.nn.Parameter(values, requires_grad=False)]) == same
    changed = values.clone()
    assert values[3, 5] != values[0, 0]
    changed[3, 5] = changed[0, 0]
    assert content_digest([changed]) != same


def test_content_digest_of_views() -> None:
    base = torch.arange(12.0)
    assert content_digest([base[3:7]]) == content_digest([base[3:7].clone()])
    assert content_digest([base[::2]]) == content_digest([base[::2].clone()])
    assert content_digest([base[:1].expand(3)]) == content_digest([torch.zeros(3)])
    assert content_digest([base.requires_grad_()]) == content_digest([torch.arange(12.0)])
    number = torch.tensor([1 + 2j])
    assert content_digest([number.conj()]) == content_digest([torch.tensor([1 - 2j])])
    assert content_digest([number.conj().imag]) == content_digest([torch.tensor([-2.0])])


def test_content_digest_with_threads() -> None:
    large = torch.arange(1 << 19)
    for parts in ([large], [(1, large)], [bytes(large.numpy())], ["small"]):
        assert content_digest(parts, threaded=True) == content_digest(parts)
    changed = large.clone()
    changed[-1] += 1
    assert content_digest([changed], threaded=True) != content_digest([large], threaded=True)


def test_content_digest_format_is_stable() -> None:
    # Digests are stored and shared, so the format must not change by accident.
    parts = ["vlcache", b"x", 1, 2.5, None, True, (3, ["y"]), torch.arange(3)]
    assert content_digest(parts) == "d30e4b5d7d37e407fab4c7f941c5a307d28152bfbef2b27725bf0374c0d7878c"


def test_content_digest_format_of_large_tensors_is_stable() -> None:
    # A digest of the tensor's digest, which devices compute.
    large = torch.arange(1 << 16, dtype=torch.int32)
    assert content_digest([large]) == "f709a81dd974b89c94b00203d4782c00c27b06ae09d19477053399da396491be"
    assert content_digest([large[1:]]) == "bfe8204c7829739000442e0f35fc68387791200980298722c25d40438ee81458"


@pytest.mark.parametrize("part", [object(), {1, 2}, {"a": 1}, [object()], torch.eye(2).to_sparse(), 1j])
def test_content_digest_rejects_other_types(part: Any) -> None:
    with pytest.raises(StoreError):
        content_digest([part])


def test_content_digest_rejects_tensors_without_bytes() -> None:
    with pytest.raises(StoreError, match="bytes of a tensor"):
        content_digest([torch.zeros(2, device="meta")])
    with FakeTensorMode():
        fake = torch.zeros(2)
    with pytest.raises(StoreError, match="bytes of a tensor"):
        content_digest([fake])


@pytest.mark.gpu
def test_content_digest_on_gpu() -> None:
    tensor = torch.randn(512, 512, dtype=torch.bfloat16).cuda()
    other = tensor.clone()
    assert content_digest([tensor]) == content_digest([other])
    assert content_digest([tensor]) == content_digest([other.t().contiguous().t()])
    assert content_digest([tensor]) != content_digest([tensor.view(256, 1024)])
    other[500, 300] += 1
    assert content_digest([tensor]) != content_digest([other])
    odd = torch.zeros(2**18 + 1, dtype=torch.uint8, device="cuda")
    assert content_digest([odd]) == content_digest([odd.cpu()])
