"""Helpers for tests of the C++ kernels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

needs_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs a processor with AVX-512 BF16"
)


def kernel_calls(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record the arguments of every later call of ``module``'s kernel."""
    kernel, seen = module._kernel(), []
    assert kernel is not None
    monkeypatch.setattr(module, "_kernel", lambda: lambda *args: (seen.append(args), kernel(*args)))
    return seen
