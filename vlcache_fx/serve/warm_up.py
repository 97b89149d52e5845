"""Compiles the programs of models ahead of time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vlcache_fx.lowering.disk_cache import Compilations
from vlcache_fx.serve.app import Service
from vlcache_fx.serve.artifacts import Manifest, recording
from vlcache_fx.serve.options import ServeOptions


def warm_up(options: ServeOptions, folder: Path) -> Manifest:
    """Load models, let them answer examples, and keep the compiled programs in a folder.

    The examples are those that a server runs before it is ready: cold and warm prompts, prefixes, decoding
    steps, alone and in batches. Programs depend on the options of the engine, so a server needs equal ones.

    Args:
        options: the models, and how to compile them.
        folder: a new folder, or an empty one.

    Raises:
        OptionError: the folder is not empty, or a model cannot be loaded.
    """
    with recording(folder):
        service, programs = Service(options), Compilations()
        asyncio.run(_run(service))
        if service.failure is not None:
            raise service.failure
        manifest = Manifest.here(
            str(service.models.device), tuple(service.models.sources), programs.num_compiled
        )
    manifest.write(folder)
    return manifest


async def _run(service: Service) -> None:
    try:
        await service.start()
    finally:
        await service.stop()
