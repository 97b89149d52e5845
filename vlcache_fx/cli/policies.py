"""``vlcache policies``."""

from __future__ import annotations

from rich.table import Table

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, examples, print_json, result_console, stdout_for_json

EPILOG = examples("vlcache policies", "vlcache policies --json")


def policies(as_json: Json = False) -> None:
    """List the installed policies."""
    with readable_errors():
        with stdout_for_json(as_json):
            from vlcache_fx.policies import get_policy, known_policies  # deferred: torch takes a second

            found = []
            for name, entry in known_policies().items():
                summary = (type(get_policy(name)).__doc__ or "").strip().partition("\n\n")[0]
                found.append((name, entry.value, " ".join(summary.split())))
        if as_json:
            names = ("name", "implementation", "recomputes")
            print_json([dict(zip(names, values, strict=True)) for values in found])
            return
        table = Table("policy")
        table.add_column("implementation", overflow="fold")
        table.add_column("recomputes")
        for values in found:
            table.add_row(*values)
        result_console().print(table)
