"""The part of keys about global state: what changes numbers, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlcache_fx.keys.numerics import device_type_of, numerics

MATMUL: Any = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


def test_full_precision_is_the_same_on_all_devices() -> None:
    torch.backends.cudnn.allow_tf32 = False
    assert numerics("cpu") == numerics("cuda") == numerics("xpu")


def test_tf32_convolutions_count_on_gpus_alone() -> None:
    texts = {}
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed
        texts[allowed] = (numerics("cpu"), numerics("cuda"))
    assert texts[True][0] == texts[False][0]
    assert texts[True][1] != texts[False][1]


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_counts_on_all_devices(precision: str) -> None:
    before = numerics("cpu"), numerics("cuda")
    torch.set_float32_matmul_precision(precision)
    assert numerics("cpu") != before[0]
    assert numerics("cuda") != before[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_counts(device: str) -> None:
    before = numerics(device)
    with torch.autocast("cpu", torch.bfloat16):
        assert numerics(device) != before
    assert numerics(device) == before


@pytest.mark.parametrize(
    "name",
    [
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",
    ],
)
def test_precision_of_sums_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numerics("cuda")
    value = getattr(MATMUL, name)
    setattr(MATMUL, name, not value)
    try:
        assert numerics("cuda") != before
    finally:
        setattr(MATMUL, name, value)


def test_device_type_of() -> None:
    assert device_type_of([torch.ones(1), 3, None]) == "cpu"
    assert device_type_of([torch.ones(1), torch.ones(1, device="meta")]) == "meta"


NEW_SETTINGS = """
import torch
from vlcache_fx.keys.numerics import numerics
before = numerics("cpu"), numerics("cuda")
torch.backends.fp32_precision = "tf32"
assert numerics("cpu") != before[0]
assert numerics("cuda") != before[1]
torch.backends.fp32_precision = "ieee"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
assert numerics("cpu") not in before
"""


def test_numerics_reads_the_current_settings_of_torch() -> None:
    # In an interpreter of its own: torch then refuses to read the older settings.
    subprocess.run([sys.executable, "-c", NEW_SETTINGS], check=True)
