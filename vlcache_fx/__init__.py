"""Reuse of vision encoder outputs and KV caches for vision-language models, as a ``torch.compile`` backend.

Names are imported on first use: ``import vlcache_fx`` alone is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vlcache_fx.version import VERSION as __version__  # noqa: N811 - the name that tools look for

if TYPE_CHECKING:
    from vlcache_fx.api import compile, mark_spans  # noqa: A004 - named after torch.compile
    from vlcache_fx.backend import engine_for
    from vlcache_fx.compiler.engine import Engine
    from vlcache_fx.compiler.exported_program import compile_exported
    from vlcache_fx.deploy.engines import EngineOptions
    from vlcache_fx.deploy.export import export
    from vlcache_fx.deploy.sessions import EngineSession, OnnxSession
    from vlcache_fx.errors import (
        CopyError,
        DamagedEntryError,
        ExportError,
        LoweringError,
        NoCompilerError,
        OptionError,
        PassError,
        PlanError,
        PolicyError,
        Reason,
        SlotError,
        StoreClosedError,
        StoreError,
        UnreadableWeightsError,
        UnsupportedGraphError,
        VlcacheError,
    )
    from vlcache_fx.fidelity.gate import check as gate
    from vlcache_fx.inserted_pass import InsertedPass
    from vlcache_fx.options import Options

__all__ = [
    "CopyError",
    "DamagedEntryError",
    "Engine",
    "EngineOptions",
    "EngineSession",
    "ExportError",
    "InsertedPass",
    "LoweringError",
    "NoCompilerError",
    "OnnxSession",
    "OptionError",
    "Options",
    "PassError",
    "PlanError",
    "PolicyError",
    "Reason",
    "SlotError",
    "StoreClosedError",
    "StoreError",
    "UnreadableWeightsError",
    "UnsupportedGraphError",
    "VlcacheError",
    "__version__",
    "compile",
    "compile_exported",
    "engine_for",
    "export",
    "gate",
    "mark_spans",
]

_HOMES = {
    "Engine": "vlcache_fx.compiler.engine",
    "EngineOptions": "vlcache_fx.deploy.engines",
    "EngineSession": "vlcache_fx.deploy.sessions",
    "OnnxSession": "vlcache_fx.deploy.sessions",
    "InsertedPass": "vlcache_fx.inserted_pass",
    "Options": "vlcache_fx.options",
    "compile": "vlcache_fx.api",
    "compile_exported": "vlcache_fx.compiler.exported_program",
    "engine_for": "vlcache_fx.backend",
    "export": "vlcache_fx.deploy.export",
    "gate": "vlcache_fx.fidelity.gate:check",
    "mark_spans": "vlcache_fx.api",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not cached here: Python caches the modules.
    home, _, inner = _HOMES.get(name, "vlcache_fx.errors").partition(":")
    return getattr(import_module(home), inner or name)


def __dir__() -> list[str]:
    return sorted(__all__)
