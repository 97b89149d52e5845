"""Digests computed on a device are those of the host."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from vlcache_fx.keys import content_digest, device_digest
from vlcache_fx.keys.device_digest import DeviceHasher, byte_view, hasher_of
from vlcache_fx.keys.digest import LARGE_BYTES, tensor_bytes

from .blake3_steps import TorchSteps

CPU = torch.device("cpu")


def test_hasher_equals_blake3() -> None:
    hasher = DeviceHasher(TorchSteps(), CPU)
    for tensor in (torch.arange(5000.0), torch.arange(4097, dtype=torch.int16).flip(0)):
        assert hasher.digest(byte_view(tensor)) == blake3(tensor_bytes(tensor)).digest()


class Failing:
    """Fails, or is wrong, from some call on."""

    def __init__(self, good_calls: int, error: Exception | None) -> None:
        self.calls, self._good_calls, self._error = 0, good_calls, error

    def chunks(self, words: torch.Tensor, values: torch.Tensor, first: int, used: int, flags: int) -> None:
        self.calls += 1
        TorchSteps().chunks(words, values, first, used, flags)
        if self.calls > self._good_calls:
            if self._error is not None:
                raise self._error
            values += 1

    def pairs(self, values: torch.Tensor, joined: torch.Tensor, flags: int) -> None:
        TorchSteps().pairs(values, joined, flags)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (Failing(0, None), "the digest of 1 bytes is wrong"),
        (Failing(0, RuntimeError("no compiler\nat all")), "no compiler"),
        (Failing(4, RuntimeError("out of memory")), "out of memory"),
    ],
    ids=["wrong", "fails", "fails later"],
)
def test_hasher_leaves_failures_to_the_host(
    steps: Failing, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    hasher = DeviceHasher(steps, CPU)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        assert hasher.digest(torch.ones(8, dtype=torch.uint8)) is None
        calls = steps.calls
        assert hasher.digest(torch.ones(8, dtype=torch.uint8)) is None
    assert steps.calls == calls
    (record,) = caplog.records
    assert record.getMessage().endswith(f"cannot hash on cpu, the host hashes instead: {text}")


def test_hasher_checks_once() -> None:
    steps = Failing(100, None)
    hasher = DeviceHasher(steps, CPU)
    hasher.digest(torch.ones(8, dtype=torch.uint8))
    checks = steps.calls - 1
    hasher.digest(torch.ones(8, dtype=torch.uint8))
    assert (checks, steps.calls) == (4, checks + 2)


def test_digest_of_a_device_is_that_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(LARGE_BYTES // 4 + 3, dtype=torch.float32)
    tensors = [
        values,
        values.view(-1, 1),
        values[1:],
        values.to(torch.bfloat16).repeat(2)[1:],
        values.neg()._neg_view(),
    ]
    on_host = [content_digest([tensor]) for tensor in tensors]
    hasher = DeviceHasher(TorchSteps(), CPU)
    seen: list[bytes | None] = []

    def digest(tensor: torch.Tensor) -> bytes | None:
        seen.append(hasher.digest(byte_view(tensor)))
        return seen[-1]

    monkeypatch.setattr("vlcache_fx.keys.digest.device_digest", digest)
    assert [content_digest([tensor]) for tensor in tensors] == on_host
    assert len(seen) == len(tensors)
    assert None not in seen


def test_byte_view_is_aligned() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    assert byte_view(data).data_ptr() == data.data_ptr()
    for offset in (1, 2, 3, 4):
        view = byte_view(data[offset:])
        assert view.data_ptr() % 4 == 0
        assert torch.equal(view, data[offset:])
    assert torch.equal(byte_view(torch.ones(2, 3).t()), byte_view(torch.ones(6)))


def test_hasher_of_the_host() -> None:
    assert hasher_of(CPU).digest(torch.ones(8, dtype=torch.uint8)) is None
    assert device_digest.device_digest(torch.ones(8)) is None


INTERPRETED = """
import torch
from blake3 import blake3
from vlcache_fx.keys.tree_hash import tree_digest
from vlcache_fx.keys import triton_blake3
from vlcache_fx.keys.triton_blake3 import TritonSteps
triton_blake3.LANES = 2  # several programs
for nbytes in (1, 130, 5 * 1024 + 7):
    data = torch.arange(nbytes).mul(7919).remainder(256).to(torch.uint8)
    assert tree_digest(data, TritonSteps()).numpy().tobytes() == blake3(data.numpy().data).digest(), nbytes
print("equal")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from vlcache_fx.keys import triton_blake3 as kernels
signatures = {
    kernels._chunks: ("*words", "*values", "count", "first", "used_bytes", "flags"),
    kernels._pairs: ("*values", "*joined", "count", "length", "flags"),
}
for kernel, names in signatures.items():
    signature = {name.strip("*"): "*i32" if name[0] == "*" else "i32" for name in names}
    source = ASTSource(kernel, signature | {"size": "constexpr"}, constexprs={(len(signature),): 128})
    assert ".visible .entry" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
print("compiled")
"""


def with_triton(code: str, cache: Path, **environment: str) -> str:
    """Run code in an interpreter of its own, because Triton's interpreter replaces the compiler for good."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which PyTorch for CUDA brings along")
    variables = os.environ | environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_equal_blake3(tmp_path: Path) -> None:
    assert with_triton(INTERPRETED, tmp_path, TRITON_INTERPRET="1").endswith("equal\n")


def test_kernels_compile(tmp_path: Path) -> None:
    assert with_triton(COMPILED, tmp_path).endswith("compiled\n")


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [1, 64, 1023, 1025, LARGE_BYTES, LARGE_BYTES + 3, (1 << 26) + 1025])
def test_kernels_on_gpu(nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    assert device_digest.device_digest(data.cuda()) == blake3(data.numpy().data).digest()


@pytest.mark.gpu
def test_digests_on_gpu_and_cpu_are_equal() -> None:
    values = torch.randn(512, 517, dtype=torch.bfloat16)
    for tensor in (values, values.t(), values.flatten()[1:], values[3:].float()):
        assert content_digest([tensor.cuda()]) == content_digest([tensor])
