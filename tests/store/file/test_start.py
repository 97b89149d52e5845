"""Opening file stores: what is refused, with which words; full disks and read-only folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.store.file import FileStore, open_file_store
from vlcache_fx.store.url import parse_url

from .files import bytes_on_disk, entry, file_of, lines, same, start


def test_url_with_all_parameters(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/cache?capacity=1MiB&secret_file={tmp_path}/secret&read=copy"
    store = open_file_store(parse_url(url), 7)
    assert store.stats().capacity_bytes == 1 << 20
    store.put("a", entry())
    store.close()
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "cache/secret").exists()
    again = open_file_store(parse_url(f"file://{tmp_path}/cache?secret_file={tmp_path}/secret"), 7)
    assert again.stats().capacity_bytes == 1 << 20  # the folder's own
    assert same(again.get("a"), entry())
    again.close()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("file://", "must be an absolute path, as in file:///var/cache/vlcache"),
        ("file://cache", "must be an absolute path"),
        ("file://~/cache", "~ and variables are not expanded"),
        ("file:///tmp/x\0y", "must be an absolute path"),
        ("file:///tmp/x?secret_file=secret", "secret_file must be an absolute path"),
        ("file:///tmp/x?color=red", "unknown color; valid: capacity, secret_file, read"),
        ("file:///tmp/x?read=fast", "read must be one of mapped, copy"),
    ],
)
def test_bad_urls(url: str, what: str) -> None:
    with pytest.raises(OptionError) as error:
        open_file_store(parse_url(url), 1 << 20)
    assert what in str(error.value)
    assert repr(url) in str(error.value)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="positive, not 0"):
        FileStore(tmp_path, 0)
    with pytest.raises(StoreError, match="'cache' is no absolute path"):
        FileStore("cache", 1)
    with pytest.raises(StoreError, match="reads='fast' is not valid"):
        FileStore(tmp_path, 1, reads="fast")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match=r"/file is no folder: a store needs a folder of its own"):
        FileStore(tmp_path / "file", 1 << 20)
    with pytest.raises(StoreError, match=r"/file/below lies below a file"):
        FileStore(tmp_path / "file/below", 1 << 20)


def test_wrong_secret(tmp_path: Path) -> None:
    FileStore(tmp_path, 1 << 20, secret=b"1" * 32).close()
    with pytest.raises(StoreError, match=r"made with another secret: give that one, or another folder"):
        FileStore(tmp_path, 1 << 20, secret=b"2" * 32)
    (tmp_path / "index.sqlite").unlink()
    with pytest.raises(StoreError, match="made with another secret"):
        FileStore(tmp_path, 1 << 20)
    FileStore(tmp_path, 1 << 20, secret=b"1" * 32).close()


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=4096))
    with pytest.raises(StoreError, match=r"no space for a store in .*: 12288 bytes are free"):
        FileStore(tmp_path, 1 << 20)


class FullDisk:
    """Writes until the disk is full, or fails."""

    def __init__(self, room: int) -> None:
        self.room, self.error = room, errno.ENOSPC

    def __call__(self, handle: int, part: memoryview) -> int:
        if self.room <= 0:
            raise OSError(self.error, os.strerror(self.error))
        count = os.write(handle, part[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture, error: int) -> None:
    disk = FullDisk(1 << 20)
    store = FileStore(tmp_path, 1 << 20, write=disk)
    store.put("a", entry(mark=1))
    disk.room, disk.error = 1000, error
    for _ in range(3):
        with pytest.raises(StoreError, match=f"entry b was not stored in {tmp_path}: {os.strerror(error)}"):
            store.put("b", entry(mark=2))
    (line,) = lines(caplog)
    assert os.strerror(error) in line
    assert list((tmp_path / "writing").iterdir()) == []
    stats = store.stats()
    assert (stats.failures, stats.entries) == (3, 1)
    assert stats.used_bytes == bytes_on_disk(tmp_path)
    assert same(store.get("a"), entry(mark=1))
    disk.room = 1 << 20
    assert store.put("b", entry(mark=2))
    assert same(store.get("b"), entry(mark=2))
    store.close()


LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = FileStore(args[0], 1 << 30)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    store.put("large", entry(2 << 20))
except StoreError as error:
    print(error)
store.put("small", entry())
print(same(store.get("small"), entry()), len(os.listdir(args[0] + "/writing")))
"""


def test_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    told = start(LIMITED, tmp_path).output().splitlines()
    assert told == [f"entry large was not stored in {tmp_path}: File too large", "True 0"]


AS_NOBODY = """
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    store = FileStore(args[0], 1 << 20, secret=b"s" * 32)
except StoreError as error:
    print(error)
    sys.exit()
print(same(store.get("a"), entry(mark=1)), "a" in store, len(store))
try:
    store.put("b", entry())
except StoreError as error:
    print(error)
print(store.stats().failures)
store.close()
"""


@pytest.fixture
def open_path(tmp_path: Path) -> Iterator[Path]:
    """A folder whose parents other users can enter."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    parents = [tmp_path, *list(tmp_path.parents)[:3]]
    modes = [(path, path.stat().st_mode) for path in parents]
    for path, mode in modes:
        path.chmod(mode | 0o755)
    yield tmp_path / "cache"
    for path, mode in modes:
        path.chmod(mode)


def test_no_permission(open_path: Path) -> None:
    assert (
        start(AS_NOBODY, open_path).output().strip()
        == f"cannot use the folder {open_path}: Permission denied"
    )
    FileStore(open_path, 1 << 20, secret=b"s" * 32).close()
    open_path.chmod(0o755)
    told = start(AS_NOBODY, open_path).output()
    assert "has mode 0755 and belongs to user 0" in told


@pytest.mark.parametrize("keeps_journal", [False, True])
def test_read_only_folder(open_path: Path, keeps_journal: bool) -> None:
    """Found entries are served, nothing is stored."""
    store = FileStore(open_path, 1 << 20, secret=b"s" * 32)
    store.put("a", entry(mark=1))
    if not keeps_journal:
        store.close()
    for path in [open_path, *open_path.rglob("*")]:
        os.chown(path, 65534, 65534)
        path.chmod(0o500 if path.is_dir() else 0o400)
    told = start(AS_NOBODY, open_path).output().splitlines()
    assert told[0] == "True True 1"
    assert told[1] == f"entry b was not stored in {open_path}: the folder is read-only"
    assert told[2] == "1"
    store.close()


def test_folder_of_a_stopped_writer_is_swept(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 1 << 20)
    store.put("a", entry())
    (tmp_path / "entries/00").mkdir(exist_ok=True)
    file_of(tmp_path, "a").rename(tmp_path / "entries/00/stray.safetensors")
    old = tmp_path / "writing/old"
    old.write_bytes(b"x" * 100)
    os.utime(old, (1, 1))
    store.close()
    again = FileStore(tmp_path, 1 << 20)
    assert not old.exists()
    assert list((tmp_path / "entries").rglob("*.safetensors")) == []
    again.close()
