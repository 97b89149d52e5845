"""Entries own exactly the tensors that they contain."""

from typing import Any

import pytest
import torch

from vlcache_fx.errors import StoreError
from vlcache_fx.store import Entry


def test_entry_copies_views() -> None:
    base = torch.arange(1000.0)
    for copy in (True, False):
        entry = Entry({"x": base[10:20], "y": base[:20].reshape(4, 5).t()}, {}, copy=copy)
        assert entry.nbytes == (10 + 20) * 4
        assert torch.equal(entry.tensors["x"], base[10:20])
        assert entry.tensors["y"].is_contiguous()


def test_entry_is_independent_of_the_original() -> None:
    tensor = torch.zeros(3)
    entry = Entry({"x": tensor}, {})
    tensor.fill_(1)
    assert entry.tensors["x"].tolist() == [0, 0, 0]


def test_entry_without_copy_shares_memory() -> None:
    tensor = torch.zeros(3)
    assert Entry({"x": tensor}, {}, copy=False).tensors["x"].data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("copy", [True, False])
def test_entry_tensors_are_plain(copy: bool) -> None:
    with torch.inference_mode():
        made = torch.ones(2)
        entry = Entry({"made": made, "learned": torch.nn.Parameter(torch.ones(2))}, {}, copy=copy)
    for tensor in entry.tensors.values():
        assert not tensor.requires_grad
        assert not tensor.is_inference()


@pytest.mark.parametrize("copy", [True, False])
def test_entry_resolves_conjugates(copy: bool) -> None:
    tensor = torch.tensor([1 + 2j]).conj()
    entry = Entry({"x": tensor}, {}, copy=copy)
    assert entry.tensors["x"].tolist() == [1 - 2j]
    assert not entry.tensors["x"].is_conj()


def test_entry_mappings_are_read_only() -> None:
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
def test_entry_info_must_be_json(info: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="JSON"):
        Entry({}, info)


@pytest.mark.parametrize("value", [[1.0], None, torch.eye(3).to_sparse()])
def test_entry_tensors_must_be_dense(value: Any) -> None:
    with pytest.raises(StoreError, match="'x' must be a dense tensor"):
        Entry({"x": value}, {})


def test_only_reading_a_tensor_waits_for_it() -> None:
    waited: list[str] = []
    tensor = torch.arange(4.0)
    entry = Entry.pending({"x": tensor}, {}, {"x": lambda: waited.append("x")}, "file")
    assert "x" in entry.tensors
    assert "y" not in entry.tensors
    assert entry.tensors.keys() == {"x"}
    assert (list(entry.tensors), len(entry.tensors), entry.nbytes) == (["x"], 1, 16)
    assert entry.peek("x") is tensor
    assert waited == []
    assert entry.tensors["x"] is tensor
    assert waited == ["x"]
