"""Tables of a benchmark's results."""

from collections.abc import Iterator

from rich.table import Table

from vlcache_fx.bench.machine import machine_line
from vlcache_fx.bench.point import Point
from vlcache_fx.bench.rounds import Summary
from vlcache_fx.bench.run import BenchResult, MeasuredPoint

NAMES = {
    "eager": "unmodified, eager",
    "plain": "unmodified, torch.compile",
    "cold": "vlcache, new image (cold)",
    "not reused": "vlcache, unmodified",
}
READINGS = {
    "plain / warm": "speedup over torch.compile, image seen before",
    "eager / warm": "speedup over the eager model, image seen before",
    "warm / floor": "time relative to a prefix hit",
    "cold / plain": "time relative to torch.compile, new image",
}
GIGA, MIB = 1e9, 2**20


def milliseconds(seconds: float) -> str:
    """Format seconds, such as ``1,234 ms`` or ``0.05 ms``."""
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.3g} ms"


def first_line(reason: str) -> str:
    """Return the first line of a reason."""
    return reason.partition("\n")[0]


def system_name(name: str) -> str:
    """Return the label of a system of a point."""
    if name in NAMES:
        return NAMES[name]
    if name.startswith("warm"):
        return f"vlcache, seen before (warm){name.removeprefix('warm')}"
    return f"floor: prefix hit, same rows{name.removeprefix('floor')}"


def tables(result: BenchResult) -> Iterator[Table]:
    """Yield the tables that follow the points' ``time_table``."""
    if any(measured.point.ratios for measured in result.points):
        yield ratio_table(result)
    if any(measured.point.warm for measured in result.points):
        yield step_table(result)
    yield cost_table(result)
    if result.compile_times:
        yield compile_table(result)
    if result.lookups:
        yield lookup_table(result)


def headline(result: BenchResult) -> str:
    """Describe the model, its device, and the machine's rates."""
    size, rates = result.size, result.rates
    recurrent = size.layers - size.attention_layers
    kinds = f" ({recurrent} of them recurrent)" if recurrent else ""
    graphs = ", warm programs as CUDA graphs" if result.settings.cuda_graphs else ""
    return (
        f"{result.model} ({result.model_class}): {size.parameters / 1e6:,.0f} M random parameters,"
        f" {size.layers} decoder layers{kinds},"
        f" {(size.layer_weights + size.head_weights) / 1e6:,.0f} M weights in them and the output,"
        f" {result.dtype}, lowering {result.settings.lowering}{graphs}\n"
        f"{machine_line(result.machine)}; on {result.device}\n"
        f"matrix product {rates.matmul_flops / GIGA:,.0f} GFLOP/s, copy {rates.copy_bytes / GIGA:,.1f} GB/s"
        f" (read + written), host read {rates.read_bytes / GIGA:,.1f} GB/s"
    )


def describe(point: Point) -> str:
    """Describe the requests of a point."""
    shape = point.shape
    images = "image" if shape.images == 1 else "images"
    samples = "" if shape.batch == 1 else f", batch {shape.batch}"
    return f"{shape.images} {images} of {shape.vision_tokens}, {point.num_tokens} tokens{samples}"


def describe_warm(point: Point, name: str = "warm") -> str:
    """Describe the images' positions, and the rows of a warm run."""
    run, (first, second) = point.warm[name], point.starts
    difference = (
        ""
        if point.cold_difference is None
        else (
            " Cold logits differ from those of the unmodified model by at most"
            f" {100 * point.cold_difference:.2f} % of the largest."
        )
    )
    return (
        f"The image starts at token {first} in the first request and at {second} in the second. The warm run"
        f" computed {point.floor_rows[run.floor]} of {point.num_tokens} rows"
        f" ({100 * run.report['token_layer_fraction']:.1f} % of the image's token-layers); the prefix hit"
        f" computes as many, with all others in the KV cache.{difference}"
    )


def time_table(measured: MeasuredPoint) -> Table:
    """Create a table of the times to first token of all systems at one point."""
    point = measured.point
    table = Table(title=f"Time to first token: {describe(point)}", title_style="bold")
    table.add_column("system")
    for heading in ("median", "lowest", "highest", "runs", "bound", "peak memory", "first call, extra"):
        table.add_column(heading, justify="right")
    for name, seconds in point.seconds.items():
        if not seconds:
            continue
        summary, bound = Summary.of(seconds), measured.bounds.get(name)
        peak, first = point.peak_memory[name], point.first_call_seconds.get(name)
        label = system_name(name)
        if name == "plain" and point.eager_recurrences:
            label += "\n  but recurrent modules in eager mode"
        if name in point.warm:
            run = point.warm[name]
            label += f"\n  donors from {run.tier}, {run.donor_bytes / MIB:,.1f} MiB"
        table.add_row(
            label,
            *(milliseconds(value) for value in (summary.median, summary.low, summary.high)),
            str(len(seconds)),
            "" if bound is None else f"{milliseconds(bound.seconds)} ({bound.limited_by})",
            ""
            if peak is None
            else f"{peak.peak_bytes / MIB:,.0f} MiB\n+{(peak.peak_bytes - peak.before_bytes) / MIB:,.0f}",
            "" if first is None else f"{first:.1f} s",
        )
    for name, reason in point.not_reused.items():
        table.add_row(f"{name}: not reused: {first_line(reason)}")
    return table


def ratio_table(result: BenchResult) -> Table:
    """Create a table of the ratios within each round, for all points."""
    table = Table(title="Compared within each round", title_style="bold")
    table.add_column("requests")
    table.add_column("ratio")
    for heading in ("median", "lowest", "highest"):
        table.add_column(heading, justify="right")
    table.add_column("meaning")
    for measured in result.points:
        for name, ratio in measured.point.ratios.items():
            values = (f"{value:.2f}" for value in (ratio.median, ratio.low, ratio.high))
            table.add_row(describe(measured.point), name, *values, READINGS.get(name, ""))
    return table


def step_table(result: BenchResult) -> Table:
    """Create a table of milliseconds per step of warm calls."""
    runs = [
        (measured.point, name, run) for measured in result.points for name, run in measured.point.warm.items()
    ]
    steps = list(dict.fromkeys(step for _, _, run in runs for step in run.step_ms))
    table = Table(title="Steps of a warm call: median milliseconds (highest)", title_style="bold")
    table.add_column("requests")
    table.add_column("variant")
    table.add_column("recomputed", justify="right")
    for step in steps:
        table.add_column(step, justify="right")
    for point, _, run in runs:
        cells = [run.step_ms.get(step) for step in steps]
        table.add_row(
            describe(point),
            run.variant.label,
            f"{100 * run.report['token_layer_fraction']:.1f} %",
            *("" if cell is None else f"{cell.median:.2f} ({cell.high:.2f})" for cell in cells),
        )
    return table


def cost_table(result: BenchResult) -> Table:
    """Create a table of skipped encoder times and overheads, per image size."""
    encoder = {time.vision_tokens: time.seconds for time in result.encoder}
    table = Table(title="Costs besides rows", title_style="bold")
    table.add_column("requests")
    for heading in ("encoder, skipped", "digest of one image's features", "digest rate", "splices, unfused"):
        table.add_column(heading, justify="right")
    for measured in result.points:
        seconds, cost, splice = (
            encoder.get(measured.point.shape.vision_tokens),
            measured.hash,
            measured.splice,
        )
        table.add_row(
            describe(measured.point),
            "" if seconds is None else milliseconds(seconds.median),
            f"{milliseconds(cost.seconds)} ({cost.nbytes / MIB:.1f} MiB)",
            f"{cost.bytes_per_second / GIGA:.1f} GB/s",
            "" if splice is None else f"{splice.calls} x {milliseconds(splice.seconds)}",
        )
    return table


def compile_table(result: BenchResult) -> Table:
    """Create a table of compile times per depth."""
    table = Table(title="Compile time", title_style="bold")
    table.add_column("system")
    for heading in ("layers", "process", "seconds"):
        table.add_column(heading, justify="right")
    for compiled in result.compile_times:
        name = "torch.compile" if compiled.system == "plain" else "vlcache, cold and warm"
        suffix = "" if compiled.not_reused is None else f" (not reused: {first_line(compiled.not_reused)})"
        table.add_row(name + suffix, str(compiled.layers), compiled.process, f"{compiled.seconds:.1f}")
    return table


def lookup_table(result: BenchResult) -> Table:
    """Create a table of lookup times per store size."""
    table = Table(title="Lookup in a memory store", title_style="bold")
    for heading in ("entries", "median", "99th percentile"):
        table.add_column(heading, justify="right")
    for lookup in result.lookups:
        table.add_row(
            f"{lookup.entries:,}",
            f"{1e6 * lookup.median_seconds:.2f} µs",
            f"{1e6 * lookup.p99_seconds:.2f} µs",
        )
    return table
