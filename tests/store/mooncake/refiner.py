# ruff: noqa: T201 - the test reads what it prints
"""A process that refines donors of three keys: arguments are a URL, and a number that tells its rows."""

from __future__ import annotations

import sys

import torch

from vlcache_fx.store import Entry
from vlcache_fx.store.mooncake import open_mooncake_store
from vlcache_fx.store.url import parse_url


def main() -> None:
    store, number = open_mooncake_store(parse_url(sys.argv[1]), 1 << 26), float(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    for contexts in (1, 2, 3, 4):
        for key in ("a", "b", "c"):
            rows = {f"k.{layer}": torch.full((500, 8), number + contexts) for layer in range(6)}
            info = {"contexts": [f"{number} {index}" for index in range(contexts)]}
            assert store.put(key, Entry(rows, info))  # type: ignore[arg-type]
    assert store.stats().failures == 0
    store.close()


if __name__ == "__main__":
    main()
