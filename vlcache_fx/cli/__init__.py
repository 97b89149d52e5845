"""The console script ``vlcache``, one file per command: arguments -> tables and files.

No other package imports this one. Its modules import torch inside functions: ``vlcache --help`` is fast.
"""

from __future__ import annotations

import typer

from vlcache_fx.cli import (
    bench,
    calibrate,
    explain,
    export,
    fidelity,
    policies,
    serve,
    store,
    version,
    warm_up,
)

app = typer.Typer(
    help="Reuse vision encoder outputs and KV caches of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(version.version)
app.command()(policies.policies)
app.command()(bench.bench)
app.command()(explain.explain)
app.command()(fidelity.fidelity)
app.command()(calibrate.calibrate)
app.command()(export.export)
app.command()(serve.serve)
app.command()(warm_up.warm_up)
app.add_typer(store.app, name="store")
