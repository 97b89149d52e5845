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
"""Inductor's setting of that name."""

LOWERINGS = ("eager", "inductor", "tensorrt")


@dataclass(frozen=True)
class InsertedPass:
    """A pass of the user in a standard pipeline (see ``vlcache_fx.passes.standard``).

    Attributes:
        step: a ``vlcache_fx.passes.Pass``. Its ``fingerprint`` becomes part of the keys of donors.
        pipeline: ``"cleanup"``, ``"cold"``, ``"warm"`` or ``"decode"``.
        before, after: name of the pass before or after which it runs; one of the two.
    """

    step: Pass
    pipeline: str
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.step, type) or not callable(getattr(self.step, "run", None)):
            raise OptionError(f"option passes: {self.step!r} is not a pass; is it the class, not an object?")
        if (self.before is None) == (self.after is None):
            raise OptionError(f"option passes: say before or after which pass {self.step.name!r} runs")


@dataclass(frozen=True)
class Options:
    """Checked options. Building one raises ``OptionError`` for any bad value.

    Attributes:
        policy: name of a registered policy, or a policy object.
        budget: share in [0, 1] of a span's token-layers that may be recomputed.
        lowering: how programs are compiled: ``"eager"``, ``"inductor"``, or ``"tensorrt"`` on an NVIDIA GPU.
        store: a ``Store``, or the URL of one: ``memory://`` (donors stay on the model's device) or ``host://``.
        capacity_bytes: bound of a store opened from a URL, in bytes.
        profile: path of a per-layer sensitivity profile (JSON), or None.
        min_span_tokens: spans shorter than this many tokens are computed, never reused.
        donor_contexts: a donor becomes the mean over up to this many contexts in which its item was computed
            exactly; 1 keeps the latest alone.
        shadow: share in [0, 1] of the warm requests that are computed in full as well, to be compared.
        shadow_max_kl: a shadow run whose logits have a mean KL divergence above this, in nats, is a
            violation; with None only those are that give another next token.
        shadow_max_violations: after this many violations a model goes without reuse.
        salt: mixed into every key; requests with different salts never share donors.
        strict: raise refusals and plan repairs instead of falling back.
        cuda_graphs: on a GPU, replay warm programs as CUDA graphs where sizes come again.
        dynamic: as in ``torch.compile``: True for symbolic lengths, False for static, None to decide.
        mode: as in ``torch.compile``, for the lowering ``"inductor"``: ``"reduce-overhead"``,
            ``"max-autotune"``, ...; what it says of CUDA graphs sets ``cuda_graphs``.
        passes: passes of the user in the standard pipelines, in the order in which they are inserted.
        dump_graphs: folder for the graphs before and after each pass, or None. The environment variable
            ``VLCACHE_DUMP_GRAPHS`` sets it, too.
    """

    policy: str | Policy = "layer_aware"
    budget: float = 0.02
    lowering: str = "inductor"
    store: str | Store = "memory://"
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
        """What ``mode`` sets of Inductor's configuration, without its CUDA graphs: ours take their place."""
        config = {} if self.mode is None else _modes()[self.mode]
        return {name: value for name, value in config.items() if name != CUDA_GRAPHS}

    @functools.cached_property
    def key_salt(self) -> str:
        """What every key begins with: ``salt``, and what passes of the user do to stored rows."""
        if not self.passes:
            return self.salt
        passes = [(one.pipeline, one.before, one.after, one.step.fingerprint()) for one in self.passes]
        return hashlib.sha256(repr((self.salt, passes)).encode()).hexdigest()

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | None = None) -> Options:
        """Options from plain data.

        Raises:
            OptionError: for a name that is not an option (the valid ones are listed) or a bad value.
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
        # A class has the method too, but is not an instance: a common slip (policy=Uniform for Uniform()).
        is_object = not isinstance(value, type) and callable(getattr(value, method, None))
        if (isinstance(value, str) and value) or is_object:
            return value
        raise _bad(name, value, noun)

    return check


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
        raise _bad(name, value, "a number of nats, 0 or more, or None")
    return float(value)


def _positive_int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value <= 0:
        raise _bad(name, value, "a positive integer")
    return int(value)


def _lowering(name: str, value: Any) -> str:
    if isinstance(value, str) and value in LOWERINGS:
        return value
    raise _bad(name, value, " or ".join(repr(item) for item in LOWERINGS))


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
    if isinstance(value, list | tuple) and all(isinstance(one, InsertedPass) for one in value):
        return tuple(value)  # a list has no hash
    raise _bad(name, value, "a list of InsertedPass(step, pipeline, before= or after=)")


def _modes() -> dict[str, dict[str, Any]]:
    from torch._inductor import list_mode_options  # here: options are checked before torch is needed

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
    "policy": _named_or_object("select", "the name of a policy, or a policy object"),
    "budget": _share,
    "lowering": _lowering,
    "store": _named_or_object("put", "a store URL such as 'memory://', or a Store object"),
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
