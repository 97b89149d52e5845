"""C++ kernels are built on supported processors and optional elsewhere."""

from __future__ import annotations

import ctypes
import logging

import pytest
import torch
from torch._inductor.codecache import CppCodeCache

from vlcache_fx.ops.native import int64_array, native_kernel

TYPES = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)


class Library:
    """A loaded library."""

    def __init__(self, is_supported: bool) -> None:
        self.vlcache_linear_is_supported = lambda: int(is_supported)
        self.vlcache_linear = lambda *_: None


def load(monkeypatch: pytest.MonkeyPatch, is_supported: bool) -> object:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(CppCodeCache, "load", lambda *_, **__: Library(is_supported))
    return native_kernel.__wrapped__("linear", TYPES)


def test_native_kernel_sets_argument_types(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load(monkeypatch, True)
    assert kernel is not None
    assert getattr(kernel, "argtypes", None) == TYPES


def test_native_kernel_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, False) is None


def test_native_kernel_on_other_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(CppCodeCache, "load", lambda *_, **__: pytest.fail("something was built"))
    assert native_kernel.__wrapped__("linear", TYPES) is None


def test_native_kernel_logs_compiler_errors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\na long story")

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(CppCodeCache, "load", fail)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        assert native_kernel.__wrapped__("linear", TYPES) is None
    assert "vlcache: cannot build the linear kernel, using PyTorch's: no compiler" in caplog.text
    assert "a long story" not in caplog.text


def test_int64_array() -> None:
    array = int64_array(3, -(2**40))
    assert list(array) == [3, -(2**40)]
    assert ctypes.sizeof(array) == 16
