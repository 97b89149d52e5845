"""The console script ``vlcache``, one file per command: arguments -> tables and files.

No other package imports this one. Its modules import torch inside functions: ``vlcache --help`` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vlcache_fx.cli import (
    bench,
    calibrate,
    doctor,
    explain,
    export,
    fidelity,
    gate,
    policies,
    serve,
    store,
    top,
    version,
    warm_up,
)
from vlcache_fx.log_output import apply_log_variable

app = typer.Typer(
    help="Reuse vision encoder outputs and KV caches of vision-language models.",
    no_args_is_help=True,
)


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version, and exit", is_eager=True, callback=version.print_version
        ),
    ] = False,
) -> None:
    """Reuse vision encoder outputs and KV caches of vision-language models."""
    del show_version
    apply_log_variable()


app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command(epilog=version.EPILOG)(version.version)
app.command(epilog=policies.EPILOG)(policies.policies)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=explain.EPILOG)(explain.explain)
app.command(epilog=fidelity.EPILOG)(fidelity.fidelity)
app.command(epilog=calibrate.EPILOG)(calibrate.calibrate)
app.command(epilog=gate.EPILOG, cls=gate.GateCommand)(gate.gate)
app.command(epilog=export.EPILOG)(export.export)
app.command(epilog=warm_up.EPILOG)(warm_up.warm_up)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=top.EPILOG)(top.top)
app.add_typer(store.app, name="store")
