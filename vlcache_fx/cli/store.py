"""``vlcache store``: look into a store, check it, drop entries."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, examples, print_json, result_console
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.cli.store_access import (
    VARIABLE,
    as_row,
    as_size,
    as_time,
    beyond,
    counted,
    named,
    names_of,
    opened,
    selected,
)
from vlcache_fx.cli.values import bytes_of
from vlcache_fx.errors import DamagedEntryError, OptionError, StoreError

if TYPE_CHECKING:
    from vlcache_fx.store.base import EntryInfo, Store

BAD_INPUT = 2
"""Exit status where the store or an argument is wrong; 1 says that ``verify`` found damage."""

app = typer.Typer(
    help="Look into a store on disk or in Mooncake, check it, drop entries.", no_args_is_help=True
)

Url = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        envvar=VARIABLE,
        show_envvar=False,
        help=f"file:///folder, mooncake://host:port, or a folder (default: ${VARIABLE})",
    ),
]
Key = Annotated[str | None, typer.Argument(help="key of an entry, or the beginning of it or of its digest")]
Salt = Annotated[str | None, typer.Option(help="entries of this salt, or tag of a salt")]
Model = Annotated[str | None, typer.Option(help="entries of this fingerprint of weights, or its tag")]
Kind = Annotated[str | None, typer.Option(help="donor, exact, text, features")]


FOLDER = "file:///var/cache/vlcache"


@app.command("ls", epilog=examples(f"vlcache store ls {FOLDER} --salt tenant-a --limit 20"))
def list_entries(
    url: Url = None,
    salt: Salt = None,
    model: Model = None,
    kind: Kind = None,
    limit: Annotated[int | None, typer.Option(min=1, help="print at most this many entries")] = None,
    as_json: Json = False,
) -> None:
    """List entries, those that are evicted first at the front."""
    with readable_errors(BAD_INPUT), opened(url) as store:
        entries = selected(store, salt, model, kind)
    shown, nbytes = entries[:limit], sum(entry.nbytes for entry in entries)
    if as_json:
        print_json({"entries": [as_row(entry) for entry in shown], "count": len(entries), "nbytes": nbytes})
        return
    table = Table("kind", "salt", "model", "digest", "tier", "size", "last used")
    for entry in shown:
        own_kind, own_salt, own_model, digest = names_of(entry.key)
        size = as_size(entry.nbytes)
        table.add_row(own_kind, own_salt, own_model, digest[:12], entry.tier, size, as_time(entry.used_at))
    console = result_console()
    console.print(table)
    more = f" ({len(shown)} shown)" if len(shown) < len(entries) else ""
    console.print(f"{counted(len(entries))}, {as_size(nbytes)}{more}", highlight=False)


@app.command(epilog=examples(f"vlcache store stats {FOLDER} --json"))
def stats(url: Url = None, as_json: Json = False) -> None:
    """Print sizes and bounds; counts begin when a store is opened."""
    with readable_errors(BAD_INPUT), opened(url) as store:
        found, kinds = store.stats(), dict[str, list[int]]()
        for entry in store.entries():
            of_kind = kinds.setdefault(names_of(entry.key)[0], [0, 0])
            of_kind[0] += 1
            of_kind[1] += entry.nbytes
    if as_json:
        by_kind = {kind: {"entries": count, "nbytes": size} for kind, (count, size) in kinds.items()}
        print_json({**asdict(found), "kinds": by_kind})
        return
    table = Table("tier", "entries", "used", "bound", "evictions", "failures", "damaged")
    for tier in found.tiers or (found,):
        used, bound = as_size(tier.used_bytes), as_size(tier.capacity_bytes)
        counts = (tier.evictions, tier.failures, tier.damaged)
        table.add_row(tier.tier, str(tier.entries), used, bound, *map(str, counts))
    console = result_console()
    console.print(table)
    for kind, (count, size) in sorted(kinds.items()):
        console.print(f"{kind}: {counted(count)}, {as_size(size)}", highlight=False)


@app.command(epilog=examples("vlcache store verify mooncake://10.0.0.1:50051"))
def verify(
    url: Url = None, salt: Salt = None, model: Model = None, kind: Kind = None, as_json: Json = False
) -> None:
    """Read every entry and check its bytes. Exit status 1 if one is damaged or cannot be read."""
    with readable_errors(BAD_INPUT), opened(url) as store:
        entries = selected(store, salt, model, kind)
        found: dict[str, list[str]] = {"intact": [], "damaged": [], "unreadable": [], "gone": []}
        with showing_progress("reading entries", len(entries)) as steps:
            for entry in entries:
                found[_checked(store, entry.key)].append(entry.key)
                steps.advance()
    counts = {state: len(keys) for state, keys in found.items()}
    bad = found["damaged"] + found["unreadable"]
    if as_json:
        print_json({"counts": counts, "damaged": found["damaged"], "unreadable": found["unreadable"]})
    else:
        for state in ("damaged", "unreadable"):
            for key in found[state]:
                typer.echo(f"{state}: {key}")
        typer.echo(", ".join(f"{count} {state}" for state, count in counts.items() if count) or "no entries")
    if bad:
        raise typer.Exit(1)


@app.command(
    epilog=examples(f"vlcache store evict {FOLDER} --to 20GiB", f"vlcache store evict {FOLDER} donor-41f2")
)
def evict(
    url: Url = None,
    key: Key = None,
    to: Annotated[str | None, typer.Option(help="evict until this many bytes are left: 1GiB")] = None,
    as_json: Json = False,
) -> None:
    """Drop an entry, or with --to those that a full store would drop first."""
    from vlcache_fx.keys.entry_key import Selection

    with readable_errors(BAD_INPUT):
        if key is None and to is None:
            url, key = _url_and_key(url, key, "evict")
        if (key is None) == (to is None):
            raise OptionError("evict takes either a KEY or --to BYTES")
        bound = None if to is None else bytes_of("--to", to, "; vlcache store clear drops all")
        with opened(url) as store:
            if bound is None:
                assert key is not None
                key = named(store, key)
                dropped = [one for one in selected(store) if one.key == key]
                if not dropped:
                    raise OptionError(f"no entry has the key {key!r}; see vlcache store why")
            else:
                dropped = beyond(selected(store), bound)
            count = sum(store.clear(Selection(key=one.key)) for one in dropped)
    _print_dropped(count, dropped, as_json)


@app.command(epilog=examples(f"vlcache store clear {FOLDER} --model 8c1f00d2a9b3e477 --yes"))
def clear(
    url: Url = None,
    salt: Salt = None,
    model: Model = None,
    kind: Kind = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    as_json: Json = False,
) -> None:
    """Drop all entries, or those of a salt, a model or a kind."""
    from vlcache_fx.keys.entry_key import Selection

    with readable_errors(BAD_INPUT), opened(url) as store:
        dropped = selected(store, salt, model, kind)
        if dropped and not yes:
            size = as_size(sum(one.nbytes for one in dropped))
            typer.confirm(f"drop {counted(len(dropped))}, {size}?", abort=True, err=True)
        wanted = Selection(salt, model)
        if kind is None and all(wanted.matches(one.key) for one in dropped):
            count = store.clear(wanted)
        else:  # tags, which a selection does not take, or a kind
            count = sum(store.clear(Selection(key=one.key)) for one in dropped)
    _print_dropped(count, dropped, as_json)


@app.command(epilog=examples(f"vlcache store why {FOLDER} donor-41f2"))
def why(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Say where an entry is, or why a key is not found: evicted, or what the nearest entry has otherwise."""
    from vlcache_fx.runtime.donors.explain_miss import explain_key, notes_of

    with readable_errors(BAD_INPUT):
        url, key = _url_and_key(url, key, "why")
        with opened(url) as store:
            key = named(store, key)
            entries = [entry for entry in store.entries() if entry.key == key]
            explanation = explain_key(key, store)
    if as_json:
        stored = [{**as_row(entry), "parts": notes_of(entry)} for entry in entries]
        print_json({**explanation.as_dict(), "stored": stored})
        return
    for entry in entries:
        typer.echo(f"{key}\n{entry.tier}: {as_size(entry.nbytes)}, last used {as_time(entry.used_at)}")
        for name, digest in notes_of(entry).items():
            typer.echo(f"  {name}: {digest}")
    if not entries:
        typer.echo(str(explanation))


def _url_and_key(url: str | None, key: str | None, command: str) -> tuple[str | None, str]:
    """Return URL and key, where a single argument is the key and the URL comes from the environment."""
    if key is None:
        url, key = os.environ.get(VARIABLE), url if url != os.environ.get(VARIABLE) else None
    if key is None:
        raise OptionError(f"{command} needs a key: vlcache store {command} URL KEY")
    return url, key


def _checked(store: Store, key: str) -> str:
    """Return ``intact``, ``damaged``, ``unreadable``, or ``gone``: another process dropped it."""
    damaged_before = store.stats().damaged
    try:
        entry = store.get(key)
        if entry is not None:
            entry.wait()
            return "intact"
    except DamagedEntryError:
        return "damaged"
    except StoreError:
        return "unreadable"
    eviction = store.evicted(key)
    is_damaged = store.stats().damaged > damaged_before or (
        eviction is not None and eviction.cause == "damaged"
    )
    return "damaged" if is_damaged else "gone"


def _print_dropped(count: int, dropped: list[EntryInfo], as_json: bool) -> None:
    nbytes = sum(entry.nbytes for entry in dropped)
    if as_json:
        print_json({"dropped": count, "nbytes": nbytes, "keys": [entry.key for entry in dropped]})
    else:
        typer.echo(f"dropped {counted(count)}, {as_size(nbytes)}")
