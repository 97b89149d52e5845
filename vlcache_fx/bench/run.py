"""The complete benchmark: points, encoder times, compile times and lookups. ``vlcache bench`` calls it."""

import dataclasses
import itertools
from collections.abc import Callable

import torch

from vlcache_fx.bench.compile_time import CompileTime, Task, measure_compile_time
from vlcache_fx.bench.device import device_name, dtype_name, resolve_device, resolve_dtype
from vlcache_fx.bench.encoder import EncoderTime, measure_encoder
from vlcache_fx.bench.machine import Machine, describe_machine
from vlcache_fx.bench.model import DecoderSize, build_model, decoder_size
from vlcache_fx.bench.overhead import HashCost, LookupCost, SpliceCost, hash_cost, lookup_costs, splice_cost
from vlcache_fx.bench.point import Point, measure_point, runs_of_point
from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.bench.rates import Rates, measure_rates
from vlcache_fx.bench.roofline import Bound, bound
from vlcache_fx.bench.settings import Settings, require_packages
from vlcache_fx.bench.systems import GIB, Systems, outlives_process
from vlcache_fx.bench.workload import RequestShape, Workload, has_grids, make_workload

EAGER_RECURRENCES = (
    "torch.compile unrolls the chunk loops of recurrent layers, which takes too long to compile for whole"
    " prompts: the plain model runs recurrent modules in eager mode, and compiles all else. The prefix hit"
    " computes recurrences with the operator of vlcache_fx, in one compiled graph."
)
"""Note on decoders with recurrences."""

STATES_PER_DONOR = 8
"""Room for states and maps of an item and of the text around it, in states."""


@dataclasses.dataclass(frozen=True)
class MeasuredPoint:
    """A point, the bounds of its systems (by name; None without a bound) and its overheads."""

    point: Point
    bounds: dict[str, Bound | None]
    hash: HashCost
    splice: SpliceCost | None


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """All results of a benchmark."""

    machine: Machine
    device: str
    dtype: str
    model: str
    model_class: str
    size: DecoderSize
    settings: Settings
    rates: Rates
    points: list[MeasuredPoint]
    encoder: list[EncoderTime]
    compile_times: list[CompileTime]
    lookups: list[LookupCost]
    notes: list[str]


Progress = Callable[[str, int, int], None]
"""Called with a description, the number of finished steps, and the number of all steps."""


def run_bench(
    spec: ModelSpec,
    settings: Settings,
    progress: Progress = lambda *_: None,
    after_point: Callable[[MeasuredPoint], None] = lambda _: None,
) -> BenchResult:
    """Measure ``spec`` with random weights on real photos; call ``after_point`` after each point.

    Raises:
        OptionError, PolicyError: a setting is not valid for this machine or model.
        MeasurementError: a run had another mode than expected.
    """
    require_packages()
    shapes = settings.shapes(settings.vision_tokens or spec.vision_tokens)
    device = resolve_device(settings.device)
    progress("building the model", 0, 1)
    width = spec.config.get("text_config", spec.config).get("hidden_size", 1024)
    dtype = resolve_dtype(settings.dtype, device, max(shape.vision_tokens for shape in shapes), width)
    model = build_model(spec.with_feature_tower(), dtype, device)
    notes = _notes(spec, settings, device)
    if not has_grids(model):
        shapes = settings.shapes((1,))
        notes.append("This encoder returns the same number of tokens for every image.")
    size = decoder_size(model)
    largest = max(shape.vision_tokens * shape.images * shape.batch for shape in shapes)
    donors = largest * (size.kv_bytes_per_token + size.hidden * size.item_bytes)
    donors += STATES_PER_DONOR * max(shape.images * shape.batch for shape in shapes) * size.state_bytes
    # Room for the donors of two points: the previous point's donors may remain.
    capacity = max(4 * GIB, 2 * donors)
    systems = Systems(model, settings.lowering, settings.variants, capacity, cuda_graphs=settings.cuda_graphs)
    if systems.eager_recurrences:
        notes.append(EAGER_RECURRENCES)
    progress("measuring the machine", 0, 1)
    rates = measure_rates(dtype, device)
    points = _points(systems, shapes, settings, size, rates, dtype, progress, after_point)
    systems.close()
    del systems, model
    return BenchResult(
        machine=describe_machine(),
        device=device_name(device, "CPU"),
        dtype=dtype_name(dtype),
        model=spec.name,
        model_class=spec.model_class,
        size=size,
        settings=settings,
        rates=rates,
        points=points,
        encoder=_encoder(spec, settings, points, dtype, device, progress),
        compile_times=_compile_times(spec, settings, shapes[0], dtype, device, progress),
        lookups=_lookups(settings, progress),
        notes=notes,
    )


def _points(
    systems: Systems,
    shapes: list[RequestShape],
    settings: Settings,
    size: DecoderSize,
    rates: Rates,
    dtype: torch.dtype,
    progress: Progress,
    after_point: Callable[[MeasuredPoint], None],
) -> list[MeasuredPoint]:
    runs = runs_of_point(settings.variants, settings.rounds, settings.eager_rounds)
    found = []
    for number, shape in enumerate(shapes):
        text = f"{shape.images} x {shape.vision_tokens} vision tokens, batch {shape.batch}"
        done = itertools.count(number * runs)
        total = len(shapes) * runs
        progress(f"warming up: {text}", next(done), total)
        workload = make_workload(systems.plain, shape)

        def advance(text: str = text, done: "itertools.count[int]" = done, total: int = total) -> None:
            progress(f"timing: {text}", next(done), total)

        point = measure_point(systems, workload, settings.rounds, settings.eager_rounds, advance)
        found.append(_with_bounds(point, workload, size, rates, dtype, systems.device))
        after_point(found[-1])
    return found


def _with_bounds(
    point: Point,
    workload: Workload,
    size: DecoderSize,
    rates: Rates,
    dtype: torch.dtype,
    device: torch.device,
) -> MeasuredPoint:
    everything = [point.num_tokens] * size.layers + [1]
    rows = {"cold": point.cold_rows or everything}
    rows |= {name: run.report["rows_per_layer"] for name, run in point.warm.items()}
    bounds = {
        name: bound(size, rates, per_layer, point.num_tokens, workload.text_positions, point.shape.batch)
        for name, per_layer in rows.items()
    }
    splice = None
    for run in list(point.warm.values())[:1]:
        text, computed = len(workload.text_positions), run.report["rows_per_layer"][0]
        splice = splice_cost(size, point.vision_tokens, text, computed, dtype, device)
    return MeasuredPoint(point, bounds, hash_cost(workload.features), splice)


def _encoder(
    spec: ModelSpec,
    settings: Settings,
    points: list[MeasuredPoint],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> list[EncoderTime]:
    if not settings.encoder:
        return []
    sizes = list(dict.fromkeys(measured.point.shape.vision_tokens for measured in points))
    steps = itertools.count(1)
    progress("timing the encoder", 0, len(sizes))
    return measure_encoder(
        spec,
        sizes,
        dtype,
        device,
        after_size=lambda: progress("timing the encoder", next(steps), len(sizes)),
    )


def _compile_times(
    spec: ModelSpec,
    settings: Settings,
    shape: RequestShape,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> list[CompileTime]:
    if not settings.compile_layers:
        return []
    task = Task("plain", spec, shape, settings.lowering, dtype_name(dtype), str(device))
    steps, total = itertools.count(1), 4 * len(settings.compile_layers)
    progress("compiling in child processes", 0, total)
    return measure_compile_time(
        task,
        settings.compile_layers,
        after_process=lambda: progress("compiling in child processes", next(steps), total),
    )


def _lookups(settings: Settings, progress: Progress) -> list[LookupCost]:
    if not settings.store_entries:
        return []
    progress("timing lookups", 0, 1)
    return lookup_costs(settings.store_entries)


def _notes(spec: ModelSpec, settings: Settings, device: torch.device) -> list[str]:
    notes = ["Times to first token exclude the encoder: all systems receive its output."]
    if spec.feature_tower is not None:
        notes.append(
            "This output is from a reduced vision encoder; encoder times are those of the full encoder."
        )
    if device.type == "cuda":
        notes.append("On a GPU, the step 'run' is the launch time; the device's time is in 'other'.")
    if any(outlives_process(variant.store) for variant in settings.variants):
        notes.append("Stores that outlive the process were reopened before every run.")
    return notes
