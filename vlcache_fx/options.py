"""The options of ``torch.compile(..., backend="vlcache", options={...})`` and of ``vlcache_fx.compile``."""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError
from vlcache_fx.inserted_pass import InsertedPass
from vlcache_fx.option_checks import CHECKS, modes

if TYPE_CHECKING:
    from vlcache_fx.policies.base import Policy
    from vlcache_fx.store.base import Store

GIB = 1024**3

CUDA_GRAPHS = "triton.cudagraphs"
"""Name of the setting in Inductor's configuration."""


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
        donor_rank: largest rank of the differences between a donor's contexts, which are stored beside their
            mean and fitted to the rows that a call recomputes; an integer, 2 or more, or 0 for the mean
            alone. It is lowered where differences would take more than a quarter of the donor's bytes.
            Default: 0.
        exact_returns: number of times that a reused item is computed in full when it returns, so that its
            donor learns from other contexts, an integer >= 0. Each costs a prompt without reuse. Default: 0.
        idle_refinement: share of the time without requests in which prompts with reused items are computed
            again, in full and in a thread, so that donors learn from them, a number in [0, 1]. It keeps the
            inputs of up to 8 prompts; a request interrupts it after a layer. Default: 0.0.
        donor_dtype: how rows of media items are stored: ``"model"`` (as computed), ``"int8"`` (with scales,
            about half of the bytes of bfloat16), or ``"float8"`` (NVIDIA GPUs of compute capability 8.9 or
            later). Packed rows are approximate everywhere: exact prefixes end before the first media item.
            Default: ``"model"``.
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
        dry_run: True to trace, analyse and rewrite graphs, and log and keep their explanations
            (``engine.explanations``), but to compile and store nothing: calls run the unmodified model, also
            with ``strict``. Default: False.

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
    donor_rank: int = 0
    exact_returns: int = 0
    idle_refinement: float = 0.0
    donor_dtype: str = "model"
    shadow: float = 0.0
    shadow_max_kl: float | None = 0.1
    shadow_max_violations: int = 3
    salt: str = field(default="", repr=False)
    strict: bool = False
    cuda_graphs: bool = False
    dynamic: bool | None = None
    mode: str | None = None
    passes: tuple[InsertedPass, ...] = ()
    dump_graphs: str | os.PathLike[str] | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            # object.__setattr__: the class is frozen, and checks normalise (numpy scalars to Python ones).
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.mode is not None and modes()[self.mode].get(CUDA_GRAPHS):
            object.__setattr__(self, "cuda_graphs", True)

    @property
    def inductor_config(self) -> dict[str, Any]:
        """Inductor settings of ``mode``, without its CUDA graphs, which ``cuda_graphs`` replaces."""
        config = {} if self.mode is None else modes()[self.mode]
        return {name: value for name, value in config.items() if name != CUDA_GRAPHS}

    @functools.cached_property
    def key_salt(self) -> str:
        """First part of every key: ``salt``, and the fingerprint of the user's passes, if any."""
        return self.key_salt_of(self.salt)

    def key_salt_of(self, salt: str) -> str:
        """Return ``key_salt`` for another salt."""
        passes = self.passes_fingerprint
        return hashlib.sha256(repr((salt, passes)).encode()).hexdigest() if passes else salt

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
