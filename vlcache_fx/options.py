"""The options of ``torch.compile(..., backend="vlcache", options={...})`` and of ``vlcache_fx.compile``."""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from vlcache_fx.passes.base import Pass
    from vlcache_fx.policies.base import Policy
    from vlcache_fx.store.base import Store

GIB = 1024**3

CUDA_GRAPHS = "triton.cudagraphs"
"""Name of the setting in Inductor's configuration."""

LOWERINGS = ("eager", "inductor", "tensorrt")


@dataclass(frozen=True)
class InsertedPass:
    """A user's pass and its position in a standard pipeline (see ``vlcache_fx.passes.standard``).

    Attributes:
        step: a ``vlcache_fx.passes.Pass`` object. Its ``fingerprint`` becomes part of the keys of donors.
        pipeline: name of the pipeline: ``"cleanup"``, ``"cold"``, ``"warm"`` or ``"decode"``.
        before, after: name of the pass before or after which ``step`` runs; exactly one of the two.

    Raises:
        OptionError: ``step`` is not a pass object, or not exactly one of ``before`` and ``after`` is given.
    """

    step: Pass
    pipeline: str
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.step, type) or not callable(getattr(self.step, "run", None)):
            raise OptionError(f"option passes: {self.step!r} is not a pass object, an instance of Pass")
        if (self.before is None) == (self.after is None):
            raise OptionError(
                f"option passes: {self.step.name!r} needs either before= or after= with the name of a pass"
            )


@dataclass(frozen=True)
class Options:
    """Checked options of ``vlcache_fx.compile`` and of the ``vlcache`` backend.

    Attributes:
        policy: the rule that chooses which rows of a reused span are recomputed: the name of a registered
            policy (``vlcache policies`` lists them) or a ``Policy`` object. Default: ``"layer_aware"``.
        budget: share of a span's token-layers that the policy may recompute, a number in [0, 1].
            Default: 0.02 (2 %).
        lowering: compiler of the rewritten graphs: ``"inductor"``, ``"eager"`` (no compiler), or
            ``"tensorrt"`` (needs an NVIDIA GPU). Default: ``"inductor"``.
        store: where donors live: ``"memory://"`` (the model's device), ``"host://"`` (pinned host memory),
            ``"file:///folder"`` (shared by processes, outlives them), ``"mooncake://host:port"`` (a Mooncake
            Store, shared by machines), a ``Store`` object, which several models can share, or a list of
            these, fastest first. Each URL may have a bound of its own: ``"memory://?capacity=2GiB"``. What
            cannot be opened is an error with ``strict``; otherwise one warning, and the model runs without
            it. Default: ``"memory://"``.
        capacity_bytes: bound in bytes of each tier whose URL has none, a positive integer. The entries that
            are cheapest to lose are evicted first: by measured cost per byte, and by how long ago they were
            used. Default: 4 GiB.
        profile: path of the model's profile for the policies ``layer_aware`` and ``auto`` (JSON, written by
            ``vlcache calibrate``), or None. Default: None.
        min_span_tokens: shortest span that is reused, in tokens, a positive integer. Shorter spans are
            computed. Default: 16.
        donor_contexts: largest number of contexts over which a donor is averaged (those in which its item
            was computed exactly), a positive integer. With 1 the latest replaces the donor. Default: 4.
        shadow: share of the warm requests that are computed in full as well, to compare the logits, a number
            in [0, 1]. Default: 0.0.
        shadow_max_kl: largest mean KL divergence of a shadow run's logits that is accepted, in nats, a
            number >= 0. With None a shadow run is a violation only if the next token differs. Default: 0.1.
        shadow_max_violations: number of violations after which reuse is turned off for the model, a positive
            integer. Default: 3.
        salt: a string that becomes part of every key: requests with different salts never share donors.
            Default: ``""``.
        strict: True to raise an error where a graph is refused or a plan needs a repair. False to run the
            graph unmodified, and to repair the plan. Default: False.
        cuda_graphs: True to replay warm programs as CUDA graphs when sizes repeat (GPU only).
            Default: False.
        dynamic: as in ``torch.compile``: True compiles with symbolic lengths, False with static ones, None
            starts static and changes to symbolic when a length changes. Default: None.
        mode: as in ``torch.compile``, for ``lowering="inductor"``: one of torch's modes
            (``"reduce-overhead"``, ``"max-autotune"``, ...) or None. Modes with CUDA graphs set
            ``cuda_graphs``. Default: None.
        passes: ``InsertedPass`` objects, a list or tuple: passes of the user in the standard pipelines,
            inserted in this order. Default: ``()``.
        dump_graphs: folder to which the graphs before and after each pass are written, or None. The
            environment variable ``VLCACHE_DUMP_GRAPHS`` sets the folder where the option is None.
            Default: None.

    Raises:
        OptionError: an option has a bad value; the message names the valid ones.
    """

    policy: str | Policy = "layer_aware"
    budget: float = 0.02
    lowering: str = "inductor"
    store: str | Store | tuple[str | Store, ...] = "memory://"
    capacity_bytes: int = 4 * GIB
    profile: str | os.PathLike[str] | None = None
    min_span_tokens: int = 16
    donor_contexts: int = 4
    shadow: float = 0.0
    shadow_max_kl: float | None = 0.1
    shadow_max_violations: int = 3
    salt: str = ""
    strict: bool = False
    cuda_graphs: bool = False
    dynamic: bool | None = None
    mode: str | None = None
    passes: tuple[InsertedPass, ...] = ()
    dump_graphs: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            # object.__setattr__: the class is frozen, and checks normalise (numpy scalars to Python ones).
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.mode is not None and _modes()[self.mode].get(CUDA_GRAPHS):
            object.__setattr__(self, "cuda_graphs", True)

    @property
    def inductor_config(self) -> dict[str, Any]:
        """Inductor settings of ``mode``, without its CUDA graphs, which ``cuda_graphs`` replaces."""
        config = {} if self.mode is None else _modes()[self.mode]
        return {name: value for name, value in config.items() if name != CUDA_GRAPHS}

    @functools.cached_property
    def key_salt(self) -> str:
        """First part of every key: ``salt``, and the fingerprint of the user's passes, if any."""
        passes = self.passes_fingerprint
        return hashlib.sha256(repr((self.salt, passes)).encode()).hexdigest() if passes else self.salt

    @functools.cached_property
    def passes_fingerprint(self) -> str:
        """A digest of the user's passes, their code and places; empty without any."""
        passes = [(item.pipeline, item.before, item.after, item.step.fingerprint()) for item in self.passes]
        return hashlib.sha256(repr(passes).encode()).hexdigest() if passes else ""

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | None = None) -> Options:
        """Return the options in ``mapping``, a dictionary of names and values; the others have defaults.

        Raises:
            OptionError: an unknown name (the message lists the valid ones) or a bad value.
        """
        given = dict(mapping or {})
        valid = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in valid]
        if unknown:
            raise OptionError(_unknown_message(unknown, valid))
        return cls(**given)


def _unknown_message(unknown: list[str], valid: list[str]) -> str:
    parts = []
    for name in unknown:
        near = difflib.get_close_matches(str(name), valid, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return f"unknown option {', '.join(parts)}; valid options are: {', '.join(valid)}"


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


def _lowering(name: str, value: Any) -> str:
    if isinstance(value, str) and value in LOWERINGS:
        return value
    raise _bad(name, value, f"one of {', '.join(map(repr, LOWERINGS))}")


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


def _modes() -> dict[str, dict[str, Any]]:
    from torch._inductor import list_mode_options  # not at the top: options do not need torch

    return list_mode_options()


def _mode(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value in _modes():
        return value
    raise _bad(name, value, f"one of {', '.join(map(repr, _modes()))}, or None")


def _optional_flag(name: str, value: Any) -> bool | None:
    return value if value is None else _flag(name, value)


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "policy": _named_or_object("select", "the name of a policy or a Policy object"),
    "budget": _share,
    "lowering": _lowering,
    "store": _stores,
    "capacity_bytes": _positive_int,
    "profile": _path,
    "min_span_tokens": _positive_int,
    "donor_contexts": _positive_int,
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
}
