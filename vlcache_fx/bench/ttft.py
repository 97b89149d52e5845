"""What the demo times: a Qwen2.5-VL-shaped decoder with random weights, asked about a photo."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from vlcache_fx.bench.device import dtype_name
from vlcache_fx.bench.machine import faster_dtype
from vlcache_fx.bench.model import build_model
from vlcache_fx.bench.point import measure_point, runs_of_point
from vlcache_fx.bench.presets import ModelSpec, qwen2_5_vl_config
from vlcache_fx.bench.rounds import MeasurementError, Summary, do_nothing
from vlcache_fx.bench.systems import Systems, Variant
from vlcache_fx.bench.workload import RequestShape, make_workload


@dataclasses.dataclass(frozen=True)
class Shape:
    """The decoder, the request and how both are run.

    Attributes:
        grid: rows and columns of vision tokens.
        short, long: tokens of text before and after the photo in the first request, and the other way round
            in the second. So the photo moves, and both requests are equally long.
        rounds: rounds of measurement; ``eager_rounds`` of them with the unmodified model.
        lowering: of the compiled model; the plain ``torch.compile`` gets the backend of that name.
    """

    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    vocabulary: int = 8192
    grid: tuple[int, int] = (46, 58)
    short: int = 20
    long: int = 40
    budget: float = 0.02
    rounds: int = 5
    eager_rounds: int = 2
    lowering: str = "inductor"

    @property
    def spec(self) -> ModelSpec:
        """The model of this shape."""
        config = qwen2_5_vl_config(self.hidden, self.layers, self.heads, self.vocabulary)
        return ModelSpec("demo", "Qwen2_5_VLForConditionalGeneration", config)


TINY = Shape(128, 2, 2, 64, grid=(8, 15), rounds=2, eager_rounds=1, lowering="eager")
"""Runs in seconds; its times mean nothing."""


@dataclasses.dataclass(frozen=True)
class TtftResult:
    """Seconds per system, and what was measured.

    Attributes:
        seconds: per system, one value per round.
        first_call_seconds: per compiled system, how much longer its first call took than a usual one.
        ratios: ``"a / b"`` within each round.
        cold_difference: largest difference of the logits, cold against plain, over their largest value.
        warm_report: what the engine said about the last warm call.
    """

    shape: Shape
    dtype: str
    parameters: int
    num_tokens: int
    vision_tokens: int
    starts: tuple[int, int]
    floor_rows: int
    seconds: dict[str, list[float]]
    first_call_seconds: dict[str, float]
    ratios: dict[str, Summary]
    cold_difference: float
    warm_report: dict[str, Any]


class TtftBench:
    """The systems and their inputs. Build it, then ``run()``."""

    def __init__(self, shape: Shape) -> None:
        vision_tokens = shape.grid[0] * shape.grid[1]
        self.shape = shape
        self.dtype = faster_dtype(vision_tokens, shape.hidden)
        self.model = build_model(shape.spec, self.dtype, torch.device("cpu"))
        self.systems = Systems(self.model, shape.lowering, [Variant(budget=shape.budget)])
        request = RequestShape(vision_tokens, text_before=shape.short, text_after=shape.long)
        self.workload = make_workload(self.model, request)

    @property
    def number_of_runs(self) -> int:
        """Timed runs in ``run()``."""
        return runs_of_point(self.systems.variants, self.shape.rounds, self.shape.eager_rounds)

    def run(self, after_run: Callable[[], None] = do_nothing) -> TtftResult:
        """Warm up, then measure. ``after_run`` is called ``number_of_runs`` times, after each timed run.

        Raises:
            MeasurementError: a run did not do what its name says.
        """
        point = measure_point(
            self.systems, self.workload, self.shape.rounds, self.shape.eager_rounds, after_run
        )
        if "warm" not in point.warm or point.cold_difference is None:
            raise MeasurementError(f"the photo was not reused: {point.not_reused}")
        wanted = ("plain / warm", "eager / warm", "warm / floor", "cold / plain")
        return TtftResult(
            shape=self.shape,
            dtype=dtype_name(self.dtype),
            parameters=sum(weight.numel() for weight in self.model.parameters()),
            num_tokens=point.num_tokens,
            vision_tokens=point.vision_tokens,
            starts=point.starts,
            floor_rows=point.floor_rows["floor"],
            seconds=point.seconds,
            first_call_seconds=point.first_call_seconds,
            ratios={name: point.ratios[name] for name in wanted},
            cold_difference=point.cold_difference,
            warm_report=point.warm["warm"].report,
        )
