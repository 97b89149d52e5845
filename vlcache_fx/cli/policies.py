"""``vlcache policies``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from vlcache_fx.cli.errors import readable_errors


def policies() -> None:
    """List the installed policies."""
    from vlcache_fx.policies import get_policy, known_policies  # deferred: importing torch takes a second

    table = Table("policy", "implementation", "recomputes")
    with readable_errors():
        for name, entry in known_policies().items():
            summary = (type(get_policy(name)).__doc__ or "").strip().partition("\n\n")[0]
            table.add_row(name, entry.value, " ".join(summary.split()))
    Console().print(table)
