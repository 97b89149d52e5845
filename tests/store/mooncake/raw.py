# ruff: noqa: T201 - the test reads what it prints
"""What others do to a Mooncake Store: a script that uses Mooncake's own client.

Arguments: port of the master, then ``put NAME HEX``, ``get NAME`` or ``remove NAME``, any number of them.
"""

from __future__ import annotations

import sys


def main() -> None:
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{sys.argv[1]}") == 0
    words = iter(sys.argv[2:])
    for word in words:
        name = next(words)
        if word == "put":
            assert store.put(name, bytes.fromhex(next(words))) == 0
        elif word == "get":
            print(store.get(name).hex())
        else:
            print(store.remove(name))
    store.close()


if __name__ == "__main__":
    main()
