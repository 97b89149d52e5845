"""Mooncake's client over a folder: a file per value. A file ``fault-OPERATION`` there makes a call fail.

It holds a code to return, ``hang``, or ``exit``; the code is returned once.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from pathlib import Path
from urllib.parse import quote, unquote


class ReplicateConfig:
    with_hard_pin = False


class MooncakeDistributedStore:
    def __init__(self) -> None:
        self.folder = Path(os.environ["IMITATION_FOLDER"])

    def setup(self, *arguments: object) -> int:
        return self.fault("setup") or 0

    def register_buffer(self, address: int, size: int) -> int:
        return self.fault("register") or 0

    def batch_is_exist(self, names: list[str]) -> list[int]:
        code = self.fault("exists")
        return [int(self.path(name).exists()) if code is None else code for name in names]

    def batch_get_into(self, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        code = self.fault("read")
        calls = zip(names, addresses, sizes, strict=True)
        return [self.read(*call) if code is None else code for call in calls]

    def read(self, name: str, address: int, size: int) -> int:
        if not self.path(name).exists():
            return -704
        data = self.path(name).read_bytes()
        if len(data) > size:
            return -600
        ctypes.memmove(address, data, len(data))
        return len(data)

    def batch_put_from(
        self, names: list[str], addresses: list[int], sizes: list[int], config: object = None
    ) -> list[int]:
        code = self.fault("write")
        for name, address, size in zip(names, addresses, sizes, strict=True):
            if code is None and not self.path(name).exists():
                self.path(name).write_bytes(ctypes.string_at(address, size))
        return [code or 0 for _ in names]

    def batch_remove(self, names: list[str], force: bool) -> list[int]:
        self.fault("remove")
        for name in names:
            self.path(name).unlink(missing_ok=True)
        return [0 for _ in names]

    def remove_by_regex(self, pattern: str, force: bool) -> int:
        code = self.fault("remove_matching")
        if code is not None:
            return code
        matching = [path for path in self.folder.iterdir() if re.search(pattern, unquote(path.name))]
        for path in matching:
            path.unlink()
        return len(matching)

    def close(self) -> int:
        return self.fault("close") or 0

    def path(self, name: str) -> Path:
        return self.folder / quote(name, safe="")

    def fault(self, operation: str) -> int | None:
        path = self.folder / f"fault-{operation}"
        if not path.exists():
            return None
        text = path.read_text()
        if text == "hang":
            time.sleep(60)
        if text == "exit":
            os._exit(3)
        path.unlink(missing_ok=True)
        return int(text)
