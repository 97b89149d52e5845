"""Digests are cached on tensors and dropped by writes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys import digest_cache as module
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.keys.digest_cache import cached_digests, digest_rows, is_tracked, join_rows, row_ranges, track
from vlcache_fx.testing.prompts import noise


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the parts of every digest."""
    parts: list[Any] = []

    def digest(given: list[Any], *, threaded: bool = False) -> str:
        parts.extend(given)
        return content_digest(given, threaded=threaded)

    monkeypatch.setattr(module, "content_digest", digest)
    return parts


def test_digest_rows_reads_tracked_tensors_once(read: list[Tensor]) -> None:
    tensor = noise(0, 6, 4)
    track(tensor)
    want = [content_digest([tensor[:2]]), content_digest([tensor[2:]])]
    for _ in range(2):
        assert digest_rows(tensor, [(0, 2), (2, 6)]) == want
    assert [len(part) for part in read] == [2, 4]
    assert digest_rows(tensor, [(2, 6), (0, 6)]) == [want[1], content_digest([tensor])]
    assert [len(part) for part in read] == [2, 4, 6]
    assert cached_digests(tensor).keys() == {(0, 2), (2, 6), (0, 6)}


def test_digest_rows_reads_other_tensors_every_time(read: list[Tensor]) -> None:
    tensor = noise(0, 6, 4)
    tracked = tensor.clone()
    track(tracked)
    for other in (tensor, tracked.clone(), tracked[:], tracked.detach()):
        read.clear()
        assert not is_tracked(other)
        assert digest_rows(other, [(0, 6)]) == digest_rows(other, [(0, 6)])
        assert len(read) == 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda tensor: tensor.add_(1),
    "through a view": lambda tensor: tensor[3].zero_(),
    "through data": lambda tensor: tensor.data.mul_(2),
    "through NumPy": lambda tensor: tensor.numpy().__imul__(2),
    "another memory": lambda tensor: tensor.set_(noise(5, 6, 4)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_track_ends_with_a_write(write: Callable[[Tensor], Any]) -> None:
    tensor = noise(0, 6, 4)
    track(tensor, {(0, 6): "cached"})
    assert digest_rows(tensor, [(0, 6)]) == ["cached"]
    write(tensor)
    assert not is_tracked(tensor)
    assert cached_digests(tensor) == {}
    assert digest_rows(tensor, [(0, 6)]) == [content_digest([tensor])]


def test_track_does_not_extend_to_copies(tmp_path: Path) -> None:
    tensor = noise(0, 6, 4)
    track(tensor, {(0, 6): "cached"})
    torch.save(tensor, tmp_path / "tensor.pt")
    for other in (copy.deepcopy(tensor), copy.copy(tensor), torch.load(tmp_path / "tensor.pt")):
        assert torch.equal(other, tensor)
        assert not is_tracked(other)
        track(other)
        assert is_tracked(other)
    assert cached_digests(tensor) == {(0, 6): "cached"}


def test_track_keeps_no_tensor_alive() -> None:
    tensor = noise(0, 600, 4)
    track(tensor)
    digest_rows(tensor, [(0, 600)])
    gone = weakref.ref(tensor)
    gc.disable()
    try:
        del tensor
        assert gone() is None
    finally:
        gc.enable()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_join_rows_keeps_digests_of_tracked_tensors(lengths: list[int], data: st.DataObject) -> None:
    parts = [noise(index, length, 3) for index, length in enumerate(lengths)]
    known = [data.draw(st.booleans()) for _ in parts]
    for part, has_digest in zip(parts, known, strict=True):
        if has_digest:
            track(part, {(0, len(part)): content_digest([part])})
    joined = join_rows(parts)
    assert torch.equal(joined, torch.cat(parts))
    digests = [content_digest([part]) for part in parts]
    want = dict(zip(row_ranges(lengths), digests, strict=True)) if all(known) else {}
    assert cached_digests(joined) == want
    assert digest_rows(joined, row_ranges(lengths)) == digests


def test_digest_rows_rejects_tensors_without_bytes() -> None:
    with pytest.raises(StoreError):
        digest_rows(torch.empty(4, 2, device="meta"), [(0, 4)])
