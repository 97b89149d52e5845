"""Secrets of stores: created once, private, and part of every code."""

import os
import threading
from pathlib import Path

import pytest

from vlcache_fx.errors import StoreError
from vlcache_fx.store.secret import SECRET_BYTES, authentication_code, load_secret


def test_secret_is_created_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(load_secret(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {path.read_bytes()}
    assert len(found[0]) == SECRET_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["secret"]


def test_readable_secret_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    load_secret(path)
    path.chmod(0o640)
    with pytest.raises(StoreError, match=r"has mode 0640, so others can read it: set it to 0600"):
        load_secret(path)


def test_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(StoreError, match="has 5 bytes, not 32"):
        load_secret(path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read the secret .*/none/secret: No such file"):
        load_secret(tmp_path / "none/secret")


def test_code_covers_secret_parts_and_their_bounds() -> None:
    one, two = b"1" * SECRET_BYTES, b"2" * SECRET_BYTES
    codes = [
        authentication_code(one, b"ab", b"c"),
        authentication_code(one, b"a", b"bc"),
        authentication_code(one, b"ab", b"d"),
        authentication_code(two, b"ab", b"c"),
    ]
    assert len(set(codes)) == len(codes)
    assert authentication_code(one, b"ab", memoryview(b"c")) == codes[0]
