"""The file store: entries that outlive their process, within one bound."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import KeyScope, Selection
from vlcache_fx.store import Entry
from vlcache_fx.store.file import FileStore
from vlcache_fx.store.file.entry_file import encode
from vlcache_fx.store.file.store import TOUCHES

from .files import bytes_on_disk, entry, file_of, lines, same

SECRET = b"s" * 32
SIZE = encode("a", entry(), SECRET).nbytes


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path, 1 << 20, secret=SECRET)
    yield store
    store.close()


def test_entry_survives(tmp_path: Path) -> None:
    first = FileStore(tmp_path / "cache", 1 << 20)
    assert first.put("a", entry(mark=3))
    first.close()
    second = FileStore(tmp_path / "cache", 1 << 20)
    assert "a" in second
    found = second.get("a")
    assert found is not None
    assert found.tier == "file"
    assert same(found, entry(mark=3))
    second.close()


def test_private_folder(tmp_path: Path) -> None:
    FileStore(tmp_path / "new/cache", 1 << 20).close()
    assert (tmp_path / "new/cache").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new/cache/secret").stat().st_mode & 0o777 == 0o600


def test_open_folder_is_tightened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o755)
    FileStore(tmp_path, 1 << 20).close()
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert [line for line in lines(caplog) if "had mode 0755" in line]


@pytest.mark.parametrize("reads", ["mapped", "copy"])
def test_all_dtypes_and_shapes(tmp_path: Path, reads: str) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    dtypes += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): torch.arange(15).reshape(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "last": torch.arange(9)}
    given = Entry(tensors, {"nested": {"list": [1, None, "ü"]}})
    store = FileStore(tmp_path, 1 << 20, reads=reads)
    store.put("a", given)
    found = store.get("a")
    store.close()
    assert found is not None
    assert list(found.tensors) == list(tensors)
    assert found.info == given.info
    for name, tensor in tensors.items():
        got = found.tensors[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_unknown_dtype_is_refused(store: FileStore) -> None:
    with pytest.raises(StoreError, match="complex128"):
        store.put("a", Entry({"x": torch.zeros(2, dtype=torch.complex128)}, {}))


def test_files_are_safetensors_in_order(store: FileStore, tmp_path: Path) -> None:
    store.put("a", entry())
    loaded = load_file(file_of(tmp_path, "a"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in entry().tensors.items())
    found = store.get("a")
    assert found is not None
    assert found.peek("key 1").data_ptr() < found.peek("value 0").data_ptr()


def test_mapped_tensors_are_not_copied(store: FileStore, tmp_path: Path) -> None:
    store.put("a", entry())
    found = store.get("a")
    assert found is not None
    address = found.tensors["key 1"].data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(file_of(tmp_path, "a")))]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


@pytest.mark.parametrize("key", ["../../x", "/etc/x", ".", "a b", "ü", "k" * 300, "a/b"])
def test_any_key_stays_in_the_folder(store: FileStore, tmp_path: Path, key: str) -> None:
    assert store.put(key, entry())
    assert same(store.get(key), entry())
    assert file_of(tmp_path, key).resolve().is_relative_to((tmp_path / "entries").resolve())


def test_entry_outlives_eviction_and_store(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 2 * SIZE)
    store.put("a", entry(mark=1))
    found = store.get("a")
    store.clear()
    store.close()
    gc.collect()
    assert same(found, entry(mark=1))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 3 * SIZE)
    for mark, key in enumerate("abc"):
        store.put(key, entry(mark=mark))
    store.get("a")
    assert "b" in store  # does not make it recent
    store.put("d", entry(mark=4))
    assert [key for key in "abcd" if key in store] == ["a", "c", "d"]
    assert store.stats().evictions == 1
    gone = store.evicted("b")
    assert gone is not None
    assert (gone.key, gone.tier, gone.cause, gone.nbytes, gone.for_key) == (
        "b",
        "file",
        "capacity",
        SIZE,
        "d",
    )
    assert store.evicted("a") is None
    assert [info.key for info in store.entries()] == ["c", "a", "d"]
    store.close()


def test_costly_entries_stay_longer(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 2 * encode("a", entry(cost_ms=100.0), SECRET).nbytes)
    store.put("a", entry(cost_ms=100.0))
    for key in "bcd":
        store.put(key, entry(cost_ms=1.0))
    assert [key for key in "abcd" if key in store] == ["a", "d"]
    # But not forever: the clock rises with each eviction.
    for number in range(200):
        store.put(f"e{number}", entry(cost_ms=1.0))
    assert "a" not in store
    store.close()


def test_too_large_is_refused(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SIZE)
    assert store.put("a", entry())
    assert not store.put("b", entry(nbytes=8192))
    assert not store.put("c", entry(nbytes=4098))
    assert "a" in store
    assert store.stats().rejections == 2
    store.close()


def test_replacement_needs_no_room_for_both(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SIZE)
    for mark in (1, 2):
        assert store.put("a", entry(mark=mark))
        assert same(store.get("a"), entry(mark=mark))
    assert (store.stats().used_bytes, store.stats().entries, store.stats().evictions) == (SIZE, 1, 0)
    assert bytes_on_disk(tmp_path) == SIZE
    store.close()


def test_bound_of_the_folder(tmp_path: Path) -> None:
    first = FileStore(tmp_path, 3 * SIZE)
    for key in "abc":
        first.put(key, entry())
    assert FileStore(tmp_path, 7, keeps_capacity=True).stats().capacity_bytes == 3 * SIZE
    second = FileStore(tmp_path, 2 * SIZE)
    assert first.stats().capacity_bytes == 2 * SIZE
    assert [key for key in "abc" if key in first] == ["b", "c"]
    first.put("d", entry())
    assert bytes_on_disk(tmp_path) == 2 * SIZE
    first.close()
    second.close()


def test_clear_selects(store: FileStore, tmp_path: Path) -> None:
    keys = [KeyScope(salt, model * 64).with_digest("donor", "0" * 64) for salt in "xy" for model in "ab"]
    for key in keys:
        store.put(key, entry())
    assert store.clear(Selection(salt="x", model="a" * 64)) == 1
    assert keys[0] not in store
    assert store.clear(Selection(model="a" * 64)) == 1
    assert [key in store for key in keys] == [False, True, False, True]
    gone = store.evicted(keys[0])
    assert gone is not None
    assert gone.cause == "cleared"
    assert store.clear() == 2
    assert (len(store), bytes_on_disk(tmp_path), store.stats().removals) == (0, 0, 4)


def test_hits_are_told_in_batches(store: FileStore, tmp_path: Path) -> None:
    store.put("a", entry())
    store.put("b", entry())
    order = [info.key for info in store.entries()]
    for _ in range(TOUCHES - 1):
        store.get("a")
    assert [info.key for info in store.entries()] == order == ["a", "b"]
    store.get("a")
    store.flush()
    assert [info.key for info in store.entries()] == ["b", "a"]


def test_closed_store_raises(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 1 << 20)
    store.put("a", entry())
    store.close()
    store.close()
    calls: list[Any] = [
        lambda: store.get("a"), lambda: store.put("a", entry()), lambda: "a" in store, lambda: len(store),
        store.clear, store.flush, lambda: list(store.entries()),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StoreClosedError):
            call()
    assert store.stats().admissions == 1


def test_unused_store_is_collected(tmp_path: Path) -> None:
    import weakref

    store = FileStore(tmp_path, 1 << 20)
    reference = weakref.ref(store)
    del store
    gc.collect()
    assert reference() is None


def test_store_is_thread_safe(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 3 * SIZE)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(12):
            mark = (seed + step) % 5
            key = f"k{mark}"
            if step % 3 == 0:
                try:
                    store.put(key, entry(mark=mark))
                except StoreError as error:
                    if "others are writing" not in str(error):
                        wrong.append(str(error))
            found = store.get(key)
            if found is not None and not same(found, entry(mark=mark)):
                wrong.append(key)
            if bytes_on_disk(tmp_path) > 3 * SIZE:
                wrong.append("bound")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.stats().damaged == 0
    store.close()


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3), st.booleans()), max_size=12))
def test_bound_and_contents(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bool]]
) -> None:
    """Whatever is stored: files stay within the bound, and what is found is what was stored last."""
    directory = tmp_path_factory.mktemp("store")
    capacity = 5 * SIZE // 2
    store = FileStore(directory, capacity)
    last: dict[str, Entry] = {}
    for key, mark, writes in steps:
        if writes:
            last[key] = entry(1024 * (mark + 1), mark)
            assert store.put(key, last[key])
        found = store.get(key)
        assert found is None or same(found, last[key])
        assert not writes or found is not None
        assert store.stats().used_bytes == bytes_on_disk(directory) <= capacity
    store.close()


def donor(contexts: int, mark: int, **parts: int) -> Entry:
    """A donor of so many contexts; ``parts`` are sizes of tensors that belong to the first."""
    tensors = {"0.k": torch.full((4,), mark)} | {
        f"0.k.{name}": torch.ones(size) for name, size in parts.items()
    }
    return Entry(tensors, {"contexts": [str(number) for number in range(contexts)]})


@pytest.mark.parametrize("parts", [{}, {"left": 3}])
def test_better_donor_stays(store: FileStore, parts: dict[str, int]) -> None:
    """Another process stored it meanwhile; its differences do not count."""
    store.put("a", donor(3, 3, **parts))
    assert store.put("a", donor(1, 1))
    assert same(store.get("a"), donor(3, 3, **parts))
    store.put("a", donor(4, 4))
    assert same(store.get("a"), donor(4, 4))


def test_donor_of_another_layout_is_replaced(store: FileStore) -> None:
    store.put("a", donor(3, 3))
    other = Entry({"0.k": torch.zeros(5)}, {"contexts": ["0"]})
    store.put("a", other)
    assert same(store.get("a"), other)


def test_info_without_tensors(store: FileStore) -> None:
    store.put("a", donor(2, 1))
    assert store.info_of("a") == {"contexts": ["0", "1"]}
    assert store.info_of("b") is None
    assert store.stats().hits == store.stats().misses == 0
