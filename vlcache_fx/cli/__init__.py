"""The console script ``vlcache``, one file per command: from arguments to tables and files.

Nothing imports this package. Its modules import torch in functions only, so that ``vlcache --help`` is quick.
"""

from __future__ import annotations

import typer

from vlcache_fx.cli import bench, calibrate, export, fidelity, policies, version

app = typer.Typer(
    help="Reuse of vision encoder outputs and KV caches for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(version.version)
app.command()(policies.policies)
app.command()(bench.bench)
app.command()(fidelity.fidelity)
app.command()(calibrate.calibrate)
app.command()(export.export)
