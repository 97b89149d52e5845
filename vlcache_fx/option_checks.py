"""Checks of the options: each takes a name and a value, and returns the value to use.

Raises:
    OptionError: the value is bad; the message names the valid ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from vlcache_fx.errors import OptionError
from vlcache_fx.inserted_pass import InsertedPass

LOWERINGS = ("eager", "inductor", "tensorrt")

DONOR_DTYPES = ("model", "int8", "float8")


def _bad(name: str, value: object, wanted: str) -> OptionError:
    return OptionError(f"option {name}={value!r} is not valid: it must be {wanted}")


def _named_or_object(method: str, noun: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        # A class has the method too: policy=Uniform instead of Uniform() is a common slip.
        is_object = not isinstance(value, type) and callable(getattr(value, method, None))
        if (isinstance(value, str) and value) or is_object:
            return value
        raise _bad(name, value, noun)

    return check


_STORE = (
    "a store URL ('memory://', 'host://', 'file:///folder', 'mooncake://host:port', each with ?capacity=8GiB "
    "where it has a bound of its own), a Store object, or a list of them, fastest first"
)


def _stores(name: str, value: Any) -> Any:
    check = _named_or_object("put", _STORE)
    if not isinstance(value, list | tuple):
        return check(name, value)
    if not value:
        raise _bad(name, value, _STORE)
    return tuple(check(name, item) for item in value)  # Options must be hashable


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise _bad(name, value, "a number in [0, 1]")
    if not 0 <= float(value) <= 1:
        raise _bad(name, value, "a share in [0, 1] (0.02 means 2 %)")
    return float(value)


def _optional_bound(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise _bad(name, value, "a number of nats >= 0, or None")
    return float(value)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value <= 0:
        raise _bad(name, value, "a positive integer")
    return int(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise _bad(name, value, "an integer >= 0")
    return int(value)


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0 or value == 1:
        raise _bad(name, value, "0 or an integer >= 2")
    return int(value)


def _one_of(valid: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in valid:
            return value
        raise _bad(name, value, f"one of {', '.join(map(repr, valid))}")

    return check


def _path(name: str, value: Any) -> str | os.PathLike[str] | None:
    if value is None or (isinstance(value, str | os.PathLike) and str(value)):
        return value
    raise _bad(name, value, "a path or None")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _bad(name, value, "a string")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad(name, value, "True or False")
    return value


def _inserted(name: str, value: Any) -> tuple[InsertedPass, ...]:
    if isinstance(value, list | tuple) and all(isinstance(item, InsertedPass) for item in value):
        return tuple(value)  # Options must be hashable
    raise _bad(name, value, "a list of InsertedPass(step, pipeline, before=...) objects (or after=...)")


def modes() -> dict[str, dict[str, Any]]:
    from torch._inductor import list_mode_options  # not at the top: options do not need torch

    return list_mode_options()


def _mode(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value in modes():
        return value
    raise _bad(name, value, f"one of {', '.join(map(repr, modes()))}, or None")


def _optional_flag(name: str, value: Any) -> bool | None:
    return value if value is None else _flag(name, value)


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "policy": _named_or_object("select", "the name of a policy or a Policy object"),
    "budget": _share,
    "lowering": _one_of(LOWERINGS),
    "store": _stores,
    "capacity_bytes": _positive_int,
    "profile": _path,
    "min_span_tokens": _positive_int,
    "donor_contexts": _positive_int,
    "donor_rank": _rank,
    "exact_returns": _count,
    "idle_refinement": _share,
    "donor_dtype": _one_of(DONOR_DTYPES),
    "shadow": _share,
    "shadow_max_kl": _optional_bound,
    "shadow_max_violations": _positive_int,
    "salt": _text,
    "strict": _flag,
    "cuda_graphs": _flag,
    "dynamic": _optional_flag,
    "mode": _mode,
    "passes": _inserted,
    "dump_graphs": _path,
    "dry_run": _flag,
}
