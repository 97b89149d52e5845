"""Times one splice from packed donors: unpacked before the program, or inside it.

``python -m vlcache_fx.bench.packed_splice``. A warm program splices the keys and the values of every layer
from donor rows and recomputed rows. Packed rows can be unpacked before a layer's compiled code reads them,
or by that code itself, which then reads half of the bytes and makes no full-size copy. The engine does the
second where a single packed donor is all that a call reads, and the first beside other donors. Keys have an
offset, values have none.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from vlcache_fx.bench.machine import describe_machine, machine_line
from vlcache_fx.bench.rounds import Summary, System, interleave
from vlcache_fx.ops import splice_rows_reference
from vlcache_fx.runtime.donors.donor_dtype import Packing, unpacked
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value

FULL, BEFORE, INSIDE = "full size", "unpacked before", "unpacked inside"


def splices(
    slot: StoredSlot, tokens: int, rows: int, heads: int, width: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return three compiled splices of equal results, but for the rounding of packed rows, by name.

    Args:
        slot: keys or values.
        tokens: stored rows.
        rows: recomputed rows, among them.
        heads, width: heads of keys and values, and their width.
        dtype: dtype of the rows.
    """
    made = torch.Generator().manual_seed(0)
    stored = torch.randn(1, tokens, heads, width, generator=made).to(dtype)
    fresh = torch.randn(1, rows, heads, width, generator=made).to(dtype)
    source = torch.arange(tokens)
    source[:rows] = -1 - torch.arange(rows)
    spec = RowSpec(1, str(dtype).removeprefix("torch."), (1, None, heads, width))
    small, *beside = Packing("int8", {slot: spec}).pack({str(slot): stored}).values()

    def full(donor: Tensor) -> Tensor:
        return splice_rows_reference(donor, fresh, source, 1)

    def inside(donor: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        rows = donor.to(torch.float32) * scale.to(torch.float32)
        whole = rows if offset is None else rows + offset.to(torch.float32)
        return splice_rows_reference(whole.to(dtype), fresh, source, 1)

    compiled, compiled_inside = torch.compile(full), torch.compile(inside)
    return {
        FULL: lambda: compiled(stored),
        BEFORE: lambda: compiled(unpacked(small, *beside)),
        INSIDE: lambda: compiled_inside(small, *beside),
    }


def measure(
    tokens: int, rows: int, heads: int, width: int, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, Summary]]:
    """Return the seconds of each splice, by slot and name."""
    found = {}
    for slot in (Key(0), Value(0)):
        torch._dynamo.reset()
        ways = splices(slot, tokens, rows, heads, width, dtype)
        systems = {name: System(run) for name, run in ways.items()}
        with torch.no_grad():
            interleave(systems, 3)
            seconds = interleave(systems, rounds)
        found[str(slot)] = {name: Summary.of(values) for name, values in seconds.items()}
    torch._dynamo.reset()
    return found


def main(
    tokens: Annotated[int, typer.Option(help="stored rows")] = 4096,
    rows: Annotated[int, typer.Option(help="recomputed rows among them")] = 82,
    heads: Annotated[int, typer.Option(help="heads of keys and values")] = 2,
    width: Annotated[int, typer.Option(help="width of a head")] = 64,
    layers: Annotated[int, typer.Option(help="layers of the model, for the sum")] = 8,
    rounds: Annotated[int, typer.Option(help="timing rounds; each times all ways in turn")] = 200,
) -> None:
    """Time the splice of one layer in bfloat16, with defaults for the shapes of the preset cpu."""
    found = measure(tokens, rows, heads, width, torch.bfloat16, rounds)
    for slot, ways in found.items():
        for name, summary in ways.items():
            typer.echo(f"{slot:4} {name:16} {summary.milliseconds(3)}")
    for name in (BEFORE, INSIDE):
        more = sum(ways[name].median - ways[FULL].median for ways in found.values())
        typer.echo(f"{name}: {1e3 * layers * more:+.1f} ms in {layers} layers beside full size")
    typer.echo(machine_line(describe_machine()))


if __name__ == "__main__":
    typer.run(main)
