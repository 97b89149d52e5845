"""What one donor costs in bytes, per kind of layer. ``python -m vlcache_fx.bench.donor_bytes``.

A decoder with one period of the model's layers, without its MLPs and vocabulary, records the donor of a small
picture. What is stored there has the sizes of the whole model's donors: keys and values grow with the
picture's tokens, maps with the number of its cuts, all else is the same for every picture. Encoder features
are stored apart.
"""

import copy
import dataclasses
from collections import Counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.bench.device import dtype_name, resolve_dtype
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.presets import ModelSpec, find_preset
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import RequestShape, make_workload
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.plan.jumps import cuts_of
from vlcache_fx.spec.slots import Factor, Inputs, Key, Matrix, StoredSlot, Term, Value

MIB = 2**20
SMALL_TOKENS = 120
"""Vision tokens of the small picture: its maps have a cut, as those of large ones have."""

SMALL_BUDGET = 0.1

CONTENTS: dict[type[StoredSlot], str] = {
    Key: "keys",
    Value: "values",
    Inputs: "last inputs of the convolution",
    Matrix: "state behind the picture",
    Factor: "maps, factors A",
    Term: "maps, terms B",
}


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """One kind of tensor in a donor.

    Attributes:
        kind: kind of the layers, as in ``layer_types``.
        slot: kind of the slot.
        dtype: dtype of the tensor.
        sizes: sizes per layer, for one token or one map where there are several.
        unit_bytes: bytes per layer of one unit.
        units: number of tokens, or of maps; 1 for states.
        layers: layers that have it.
    """

    kind: str
    slot: type[StoredSlot]
    dtype: str
    sizes: tuple[int, ...]
    unit_bytes: int
    units: int
    layers: int

    @property
    def total_bytes(self) -> int:
        """Bytes in all layers."""
        return self.unit_bytes * self.units * self.layers


def donor_parts(spec: ModelSpec, vision_tokens: int, dtype: torch.dtype, budget: float) -> list[StoredPart]:
    """Return the parts of a donor.

    Args:
        spec: the model.
        vision_tokens: tokens of the picture.
        dtype: dtype of the model.
        budget: share of the picture that is recomputed; decides where maps are cut.

    Raises:
        MeasurementError: the model's calls are not reused.
    """
    small, kinds = _one_period(spec)
    tensors, tokens = _recorded(small, dtype)
    num_maps = len(cuts_of(vision_tokens, budget)) - 1
    units: dict[type[StoredSlot], int] = {
        Key: vision_tokens, Value: vision_tokens, Factor: num_maps, Term: num_maps,
    }  # fmt: skip
    of_kind, seen, found = Counter(kinds), set(), []
    for name, tensor in sorted(tensors.items()):
        slot: Any = StoredSlot.parse(name)
        kind = kinds[slot.layer]
        if (kind, type(slot), getattr(slot, "index", 0)) in seen or type(slot) not in CONTENTS:
            continue
        seen.add((kind, type(slot), getattr(slot, "index", 0)))
        stored = 1
        if isinstance(slot, Key | Value):
            stored = tokens
        elif isinstance(slot, Factor | Term):
            stored = tensor.shape[0]
        sizes = _without(tuple(tensor.shape), stored)
        name_of_dtype = dtype_name(tensor.dtype)
        number = units.get(type(slot), 1)
        found.append(
            StoredPart(kind, type(slot), name_of_dtype, sizes, tensor.nbytes // stored, number, of_kind[kind])
        )
    return sorted(found, key=lambda part: (part.kind, [*CONTENTS].index(part.slot)))


def _without(sizes: tuple[int, ...], units: int) -> tuple[int, ...]:
    """Return sizes without leading ones and without the dimension of units."""
    left = list(sizes)
    if units > 1:
        left.remove(units)
    while left and left[0] == 1:
        left.pop(0)
    return tuple(left)


def _one_period(spec: ModelSpec) -> tuple[ModelSpec, list[str]]:
    """Return a small model that has every kind of layer, and the kinds of the whole model's layers."""
    import transformers

    config: Any = getattr(transformers, spec.model_class).config_class.from_dict(
        copy.deepcopy(dict(spec.config))
    )
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    depth = 1 + max(kinds.index(kind) for kind in kinds)
    small = copy.deepcopy(dict(spec.with_layers(depth).with_feature_tower().config))
    own = small.get("text_config", small)
    own |= {
        "vocab_size": 64,
        "intermediate_size": 64,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if own.get("layer_types"):
        own["layer_types"] = kinds[:depth]
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    small |= {name: number for number, name in enumerate(ids, 2)}
    return dataclasses.replace(spec, config=small), kinds


def _recorded(spec: ModelSpec, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], int]:
    """Return what the donor of a small picture stores, and the picture's tokens."""
    model = build_model(spec, dtype, torch.device("cpu"))
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        workload = make_workload(model, RequestShape(SMALL_TOKENS))
        torch._dynamo.reset()
        reusing: Any = vlcache_fx.compile(model, lowering="eager", dynamic=True, budget=SMALL_BUDGET)
        reusing(**workload.first)
    report = reusing.vlcache.last_report or {
        "mode": "bypass",
        "reason": "the engine was not called",
        "spans": [],
    }
    if report["mode"] != "cold" or not report["spans"]:
        raise MeasurementError(f"{spec.name} records no donors: {report['reason']}")
    entry = reusing.vlcache.store.get(report["spans"][0]["key"])
    if entry is None:
        raise MeasurementError(f"{spec.name}: the donor was not kept")
    tensors = dict(entry.tensors)
    reusing.vlcache.close()
    return tensors, workload.vision_tokens


def table_of(parts: list[StoredPart], spec: ModelSpec, vision_tokens: int) -> Table:
    """Create a table of the parts, and of the sums per kind of layer."""
    table = Table(title=f"One donor of {vision_tokens:,} vision tokens: {spec.name}", title_style="bold")
    table.add_column("layers")
    table.add_column("stored")
    for heading in ("sizes", "dtype", "KiB each", "number per layer", "MiB per layer", "MiB in all layers"):
        table.add_column(heading, justify="right")
    for part in parts:
        table.add_row(
            f"{part.layers} {part.kind}",
            CONTENTS[part.slot],
            " x ".join(map(str, part.sizes)),
            part.dtype,
            f"{part.unit_bytes / 1024:,.2f}",
            f"{part.units:,}",
            f"{part.unit_bytes * part.units / MIB:,.2f}",
            f"{part.total_bytes / MIB:,.1f}",
        )
    for kind in dict.fromkeys(part.kind for part in parts):
        own = sum(part.total_bytes for part in parts if part.kind == kind)
        table.add_row(f"all {kind}", "", "", "", "", "", "", f"{own / MIB:,.1f}")
    checkpoint = sum(part.total_bytes for part in parts if part.slot in (Inputs, Matrix))
    if checkpoint:
        text = "states that a block of text adds to its keys and values"
        table.add_row("checkpoint", text, "", "", "", "", "", f"{checkpoint / MIB:,.1f}")
    total = sum(part.total_bytes for part in parts)
    table.add_row("donor", "", "", "", "", "", "", f"{total / MIB:,.1f}")
    return table


def main(
    preset: Annotated[str, typer.Option(help="model shape, see vlcache bench --help")] = "cpu-hybrid",
    vision_tokens: Annotated[int, typer.Option(min=1, help="vision tokens of the picture")] = 4096,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "bfloat16",
    budget: Annotated[float, typer.Option(help="share of the picture that is recomputed")] = 0.02,
    markdown: Annotated[bool, typer.Option(help="print a table of Markdown")] = False,
) -> None:
    """Print a table."""
    spec = find_preset(preset)
    table = table_of(
        donor_parts(
            spec, vision_tokens, resolve_dtype(dtype, torch.device("cpu"), vision_tokens, 1024), budget
        ),
        spec,
        vision_tokens,
    )
    if not markdown:
        Console(width=140).print(table)
        return
    columns = [list(column.cells) for column in table.columns]
    lines = [
        [str(column.header) for column in table.columns],
        ["---"] * len(columns),
        *zip(*columns, strict=True),
    ]
    for line in lines:
        typer.echo(f"| {' | '.join(map(str, line))} |")


if __name__ == "__main__":
    typer.run(main)
