"""Calls of a function that ``torch.compile(backend="vlcache")`` returned, watched by the backend.

Dynamo calls a backend to compile a graph, but does not report calls that it runs uncompiled. So a hook is
added to the object that torch made for the region (``torch._dynamo.eval_frame``). It enters our context in
every later call, as it enters a backend's own ``backend_ctx_ctor``, which ``torch.compile`` hides.
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
"""Dynamo's default. Another value was set by the user, and stays."""


def uncompiled_refusal() -> UnsupportedGraphError:
    """The refusal of a call in which no graph ran."""
    limit = torch._dynamo.config.recompile_limit
    return UnsupportedGraphError(
        Reason.UNCOMPILED,
        f"Dynamo ran the call uncompiled: recompile_limit ({limit}) is reached, or it cannot trace the "
        "model; TORCH_LOGS=recompiles,graph_breaks says which",
    )


def raise_recompile_limit() -> None:
    """Raise Dynamo's limit for good, unless the user set one.

    The limit holds for a code object, and models of the transformers library have one in common: where a
    second model has reached it, no backend is called for the third, so raising it during calls alone would
    not do. Config values belong to a thread in newer versions of torch: ``watch`` raises it for the others.
    """
    if torch._dynamo.config.recompile_limit == TORCH_RECOMPILE_LIMIT:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def raise_limits() -> None:
    """Raise Dynamo's limit, and that of the function that it compiles now, unless the user set one."""
    raise_recompile_limit()
    if torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT:
        raise_graph_limit(RECOMPILE_LIMIT)


def watch(engine: Engine) -> None:
    """Count the calls of the region that is compiling now, for ``engine``."""
    region = _compiling_region()
    hooks = getattr(region, "enter_exit_hooks", None)
    if isinstance(hooks, list) and _Watch(engine) not in hooks:
        hooks.append(_Watch(engine))


@dataclass(frozen=True)
class _Watch:
    """Entered before a call, in the thread of the call; returns the function to call after it."""

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
    """The nearest region in the stack: that of the call that Dynamo is compiling."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        # No other frame's variables are read: that would keep them alive.
        if frame.f_code.co_filename == eval_frame.__file__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, eval_frame._TorchDynamoContext):
                return owner
    return None
