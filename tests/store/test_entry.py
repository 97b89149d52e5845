"""Entries own exactly what they say they hold."""

from typing import Any

import pytest
import torch

from vlcache_fx.errors import StoreError
from vlcache_fx.store import Entry


def test_a_view_does_not_keep_its_base() -> None:
    base = torch.arange(1000.0)
    for copy in (True, False):
        entry = Entry({"x": base[10:20], "y": base[:20].reshape(4, 5).t()}, {}, copy=copy)
        assert entry.nbytes == (10 + 20) * 4
        assert torch.equal(entry.tensors["x"], base[10:20])
        assert entry.tensors["y"].is_contiguous()


def test_writing_to_the_original_does_not_change_the_entry() -> None:
    tensor = torch.zeros(3)
    entry = Entry({"x": tensor}, {})
    tensor.fill_(1)
    assert entry.tensors["x"].tolist() == [0, 0, 0]


def test_a_tensor_given_away_is_not_copied() -> None:
    tensor = torch.zeros(3)
    assert Entry({"x": tensor}, {}, copy=False).tensors["x"].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("copy", [True, False])
def test_no_gradients_and_no_inference_tensors(copy: bool) -> None:
    with torch.inference_mode():
        made = torch.ones(2)
        entry = Entry({"made": made, "learned": torch.nn.Parameter(torch.ones(2))}, {}, copy=copy)
    for tensor in entry.tensors.values():
        assert not tensor.requires_grad
        assert not tensor.is_inference()


@pytest.mark.parametrize("copy", [True, False])
def test_lazy_conjugates_are_resolved(copy: bool) -> None:
    tensor = torch.tensor([1 + 2j]).conj()
    entry = Entry({"x": tensor}, {}, copy=copy)
    assert entry.tensors["x"].tolist() == [1 - 2j]
    assert not entry.tensors["x"].is_conj()


def test_both_mappings_are_read_only_and_nothing_is_shared() -> None:
    info: dict[str, Any] = {"spans": [1, 2]}
    tensors = {"x": torch.zeros(1)}
    entry = Entry(tensors, info)
    info["spans"].append(3)
    tensors["y"] = torch.zeros(1)
    assert entry.info["spans"] == [1, 2]
    assert list(entry.tensors) == ["x"]
    with pytest.raises(TypeError):
        entry.tensors["y"] = torch.zeros(1)  # type: ignore[index]
    with pytest.raises(TypeError):
        entry.info["y"] = 1  # type: ignore[index]


@pytest.mark.parametrize("info", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}])
def test_info_is_json(info: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="JSON"):
        Entry({}, info)


@pytest.mark.parametrize("value", [[1.0], None, torch.eye(3).to_sparse()])
def test_tensors_are_dense_tensors(value: Any) -> None:
    with pytest.raises(StoreError, match="'x' must be a dense tensor"):
        Entry({"x": value}, {})
