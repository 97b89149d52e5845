"""The child process that runs Mooncake's client: started as a script, imports nothing of this package.

It takes requests from a socket as JSON, one message each, and answers with the codes that Mooncake returned.
Tensors travel through memory that parent and child share. It ends when the parent closes the socket or dies.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

CLOSE_S = 0.5
"""How long Mooncake may take to sign off; it can hang where the master does."""

THREADS = 8


class Worker:
    """Carries out requests.

    Args:
        setup: arguments of Mooncake's ``setup``.
        fd: descriptor of the shared memory.
        nbytes: its size.
    """

    def __init__(self, setup: dict[str, Any], fd: int, nbytes: int) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self._pinned = ReplicateConfig()
        self._pinned.with_hard_pin = True
        self._store = MooncakeDistributedStore()
        code = self._store.setup(
            setup["local"],
            setup["metadata"],
            0,  # no memory of this process for other clients' values
            setup["local_buffer_bytes"],
            setup["protocol"],
            setup["device"],
            setup["master"],
        )
        if code != 0:
            raise RuntimeError(f"Mooncake's setup returned {code}")
        self._memory = mmap.mmap(fd, nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        code = self._store.register_buffer(self._address, nbytes)
        if code != 0:
            raise RuntimeError(f"Mooncake's register_buffer returned {code}")

    def answers(self, request: dict[str, Any]) -> Iterator[list[int]]:
        """Yield the codes of a request: one list, or one per group of a read."""
        operation, names = request["op"], request.get("names", [])
        if operation == "exists":
            yield list(self._store.batch_is_exist(names))
        elif operation == "read":
            for group in request["groups"]:
                addresses = [self._address + offset for offset in group["offsets"]]
                yield list(self._store.batch_get_into(group["names"], addresses, group["sizes"]))
        elif operation == "write":
            addresses = [self._address + offset for offset in request["offsets"]]
            extra = [self._pinned] if request["pinned"] else []
            yield list(self._store.batch_put_from(names, addresses, request["sizes"], *extra))
        elif operation == "remove":
            yield list(self._store.batch_remove(names, request["force"]))
        elif operation == "remove_matching":
            yield [self._store.remove_by_regex(request["pattern"], True)]
        else:
            raise ValueError(f"unknown operation {operation!r}")

    def close(self) -> None:
        """Sign off from the master."""
        self._store.close()


def main() -> None:
    """Serve requests until the socket is closed; arguments: the descriptor of the socket."""
    connection = Connection(int(sys.argv[1]))
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            connection.send_bytes(json.dumps(message).encode())

    def serve(worker: Worker, request: dict[str, Any]) -> None:
        try:
            for codes in worker.answers(request):
                send({"id": request["id"], "codes": codes})
        except OSError:
            os._exit(0)  # the parent is gone
        except Exception as error:  # noqa: BLE001 - the parent learns of each
            send({"id": request["id"], "error": f"{type(error).__name__}: {error}"})

    worker: Worker | None = None
    try:
        first = json.loads(connection.recv_bytes())
        try:
            worker = Worker(first["setup"], first["fd"], first["nbytes"])
            send({"id": first["id"], "codes": []})
        except Exception as error:  # noqa: BLE001
            send({"id": first["id"], "error": f"{type(error).__name__}: {error}"})
            return
        pool = ThreadPoolExecutor(THREADS)
        while True:
            pool.submit(serve, worker, json.loads(connection.recv_bytes()))
    except (EOFError, OSError):
        pass
    finally:
        if worker is not None:
            closing = threading.Thread(target=worker.close, daemon=True)
            closing.start()
            closing.join(CLOSE_S)
        os._exit(0)  # native threads may still wait for a server that hangs


if __name__ == "__main__":
    main()
