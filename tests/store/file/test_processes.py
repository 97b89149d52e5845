"""Processes that share a folder: one bound, no wrong bytes, also when one is killed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vlcache_fx.store.file import FileStore
from vlcache_fx.store.file.entry_file import encode

from .files import bytes_on_disk, entry, same, start

SIZE = encode("k0", entry(), b"s" * 32).nbytes


def test_one_stores_another_finds(tmp_path: Path) -> None:
    told = start('print(FileStore(args[0], 1 << 20).put("a", entry(mark=7)))', tmp_path).output()
    assert told == "True\n"
    store = FileStore(tmp_path, 1 << 20)
    assert same(store.get("a"), entry(mark=7))
    told = start('print(same(FileStore(args[0], 1 << 20).get("a"), entry(mark=7)))', tmp_path).output()
    assert told == "True\n"
    store.close()


def test_processes_that_start_together(tmp_path: Path) -> None:
    code = "s = FileStore(args[0], 1 << 20); print(s.put(args[1], entry())); s.close()"
    processes = [start(code, tmp_path / "new/cache", f"k{number}") for number in range(3)]
    assert [process.output() for process in processes] == ["True\n"] * 3
    store = FileStore(tmp_path / "new/cache", 1 << 20)
    assert len(store) == 3
    assert all(same(store.get(f"k{number}"), entry()) for number in range(3))
    store.close()


HAMMER = """
import random
random.seed(int(args[1]))
torch.set_num_threads(1)
store = FileStore(args[0], int(args[2]))
stored = wrong = found = 0
print("ready", flush=True)
end = time.monotonic() + float(args[3])
while time.monotonic() < end:
    mark = random.randrange(8)
    if random.random() < 0.4:
        try:
            stored += store.put(f"k{mark}", entry(mark=mark))
        except StoreError as error:
            assert "others are writing" in str(error), error
    got = store.get(f"k{mark}")
    if got is not None:
        found += 1
        wrong += not same(got, entry(mark=mark))
    if random.random() < 0.02:
        store.clear()
print(wrong, stored > 0, found > 0, store.stats().damaged)
store.close()
"""


@pytest.mark.slow
def test_bound_holds_while_processes_write_and_one_is_killed(tmp_path: Path) -> None:
    capacity = 7 * SIZE // 2
    processes = [start(HAMMER, tmp_path, seed, capacity, 5) for seed in range(3)]
    for process in processes:
        process.wait_for("ready")
    highest = 0
    for step in range(30):
        highest = max(highest, bytes_on_disk(tmp_path))
        time.sleep(0.05)
        if step == 15:
            processes[0].kill()
    told = [process.output() for process in processes[1:]]
    assert told == ["ready\n0 True True 0\n"] * 2
    assert SIZE <= highest <= capacity
    store = FileStore(tmp_path, capacity)
    assert store.put("last", entry())
    assert store.stats().used_bytes == bytes_on_disk(tmp_path) <= capacity
    store.close()


STUCK = """
def write(handle, part):
    count = os.write(handle, part[:1000])
    if os.lseek(handle, 0, os.SEEK_CUR) > 3000:
        print("writing", flush=True)
        time.sleep(60)
    return count

FileStore(args[0], int(args[1]), write=write).put("a", entry())
"""


def test_killed_writer_leaves_nothing(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 2 * SIZE)
    store.put("b", entry(mark=1))
    writer = start(STUCK, tmp_path, 2 * SIZE)
    writer.wait_for("writing")
    assert store.stats().used_bytes == 2 * SIZE  # reserved before it is written
    assert store.get("a") is None
    store.put("c", entry(mark=2))  # takes the place of b, not of what is being written
    assert [key for key in "abc" if key in store] == ["c"]
    writer.kill()
    assert store.put("d", entry(mark=3))
    assert [key for key in "abcd" if key in store] == ["c", "d"]
    assert list((tmp_path / "writing").iterdir()) == []
    assert store.stats().used_bytes == bytes_on_disk(tmp_path) == 2 * SIZE
    store.close()


KILLED_AT_COMMIT = """
from vlcache_fx.store.file.folder import Folder
publish = Folder.publish
def killed(self, new, key):
    publish(self, new, key)
    os.kill(os.getpid(), 9)
Folder.publish = killed
FileStore(args[0], 1 << 20).put("a", entry(int(args[1]), mark=5))
"""


@pytest.mark.parametrize("replaces", [False, True])
def test_writer_killed_before_its_commit(tmp_path: Path, replaces: bool) -> None:
    if replaces:
        first = FileStore(tmp_path, 1 << 20)
        first.put("a", entry(mark=1))
        first.close()
    start(KILLED_AT_COMMIT, tmp_path, 8192).output(None)
    store = FileStore(tmp_path, 1 << 20)
    assert store.get("a") is None
    assert store.stats().used_bytes == bytes_on_disk(tmp_path) == 0
    store.close()


FORKED = """
store = FileStore(args[0], 1 << 20)
store.put("a", entry(mark=1))
store.get("a")
pid = os.fork()
if pid == 0:
    right = same(store.get("a"), entry(mark=1)) and store.put("b", entry(mark=2)) and store.flush(10)
    os._exit(0 if right else 1)
_, status = os.waitpid(pid, 0)
print(status, same(store.get("b"), entry(mark=2)), store.put("c", entry()), len(store))
store.close()
"""


def test_store_after_a_fork(tmp_path: Path) -> None:
    assert start(FORKED, tmp_path).output() == "0 True True 3\n"
