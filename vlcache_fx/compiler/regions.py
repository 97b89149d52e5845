"""Detects calls of ``torch.compile(backend="vlcache")`` that Dynamo runs uncompiled.

Dynamo calls a backend to compile a graph, but does not report calls that it runs uncompiled. So ``watch``
adds a hook to torch's object for the compiled region (``torch._dynamo.eval_frame``), which calls it in every
later call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import eval_frame

from vlcache_fx.capture.dynamo_settings import RECOMPILE_LIMIT
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import raise_graph_limit
from vlcache_fx.errors import Reason, UnsupportedGraphError

TORCH_RECOMPILE_LIMIT = 8
"""Dynamo's default. Any other value was set by the user, and stays."""


def uncompiled_refusal() -> UnsupportedGraphError:
    """Return the refusal of a call in which no graph ran."""
    limit = torch._dynamo.config.recompile_limit
    return UnsupportedGraphError(
        Reason.UNCOMPILED,
        f"Dynamo ran the call uncompiled: recompile_limit ({limit}) is reached, or it cannot trace the "
        "model; TORCH_LOGS=recompiles,graph_breaks says which",
    )


def untraced_refusal(failure: Exception) -> UnsupportedGraphError:
    """Return the refusal of a call that Dynamo failed to trace."""
    text = next((line for line in str(failure).splitlines() if line.strip()), type(failure).__name__)
    return UnsupportedGraphError(
        Reason.DATA_DEPENDENT, f"Dynamo cannot trace the model: {text.strip()[:200]}"
    )


def raise_recompile_limit() -> None:
    """Raise Dynamo's limit permanently, unless the user set one.

    The limit counts per code object, which models of the transformers library share. After other models have
    reached it, Dynamo calls no backend for the next one: too late to raise it. In newer versions of torch,
    config values are thread-local: ``watch`` raises the limit in other threads.
    """
    if torch._dynamo.config.recompile_limit == TORCH_RECOMPILE_LIMIT:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def raise_limits() -> None:
    """Raise Dynamo's limit and that of the function being compiled, unless the user set one."""
    raise_recompile_limit()
    if torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT:
        raise_graph_limit(RECOMPILE_LIMIT)


def watch(engine: Engine) -> None:
    """Report uncompiled calls of the region being compiled to ``engine``."""
    region = _compiling_region()
    hooks = getattr(region, "enter_exit_hooks", None)
    if isinstance(hooks, list) and _Watch(engine) not in hooks:
        hooks.append(_Watch(engine))


@dataclass(frozen=True)
class _Watch:
    """A hook that Dynamo calls before each call; returns the function to call after it."""

    engine: Engine

    def __call__(self) -> Callable[[], None]:
        raise_recompile_limit()
        graphs, handled = self.engine.graph_calls, sys.exc_info()[1]

        def leave() -> None:
            failed = sys.exc_info()[1] is not handled
            if not failed and self.engine.graph_calls == graphs:
                self.engine.ran_uncompiled(uncompiled_refusal())

        return leave


def _compiling_region() -> Any:
    """Return the innermost region in the stack: that of the call being compiled."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        # Variables of other frames are not read: that would keep them alive.
        if frame.f_code.co_filename == eval_frame.__file__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, eval_frame._TorchDynamoContext):
                return owner
    return None
