"""All checks, in the order in which one depends on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

from vlcache_fx.doctor.check import Check, checked

Checks: TypeAlias = list[tuple[str, Callable[[], Check]]]

MEMORY = "memory://"


def checklist(stores: Sequence[str] = (MEMORY,)) -> Iterator[Check]:
    """Yield the result of each check when it is known. None raises.

    Args:
        stores: URLs of stores to check.
    """
    for part in (_packages, _compiler, partial(_storage, stores), _self_test):
        try:
            checks = part()
        except Exception as error:  # noqa: BLE001 (an import that fails, for one)
            yield checked(getattr(part, "__name__", "store").strip("_"), partial(_raise, error))
            continue
        for name, check in checks:
            yield checked(name, check)


def _raise(error: Exception) -> Check:
    raise error


def _packages() -> Checks:
    from vlcache_fx.doctor import packages
    from vlcache_fx.doctor.requirements import extras

    checks: Checks = [
        ("python", packages.check_python),
        ("vlcache_fx", packages.check_package),
        ("torch", packages.check_torch),
        ("transformers", packages.check_transformers),
    ]
    return checks + [(f"extra {extra}", partial(packages.check_extra, extra)) for extra in extras()]


def _compiler() -> Checks:
    import torch

    from vlcache_fx.doctor import compiler, machine

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        ("gpu", machine.check_gpu),
        ("threads", machine.check_threads),
        ("torch.compile backend", compiler.check_backend),
        *((f"inductor on {device}", partial(compiler.check_inductor, device)) for device in devices),
        ("kernels of vlcache_fx", compiler.check_kernels),
        ("cache of compiled programs", compiler.check_cache),
    ]


def _storage(stores: Sequence[str]) -> Checks:
    from vlcache_fx.doctor.storage import check_store

    return [(f"store {url}", partial(check_store, url)) for url in stores]


def _self_test() -> Checks:
    from vlcache_fx.doctor.self_test import check_reuse

    return [("self-test", check_reuse)]
