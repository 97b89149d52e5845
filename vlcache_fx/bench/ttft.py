"""Time to first token of a Qwen2.5-VL-shaped decoder with random weights, asked about a photo."""

import dataclasses
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.bench.decoder import (
    IMAGE,
    VISION_END,
    VISION_START,
    WORDS,
    Shape,
    build_model,
    photo_patches,
)
from vlcache_fx.bench.machine import faster_dtype
from vlcache_fx.bench.rounds import Summary, System, interleave, paired_ratio, time_once


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
        torch._dynamo.reset()
        self.shape = shape
        self.dtype = faster_dtype(shape.grid[0] * shape.grid[1], shape.hidden)
        self.plain = build_model(shape, self.dtype)
        self.compiled: Any = torch.compile(self.plain.forward, backend=shape.lowering, dynamic=True)
        self.reusing: Any = vlcache_fx.compile(
            build_model(shape, self.dtype), budget=shape.budget, lowering=shape.lowering, dynamic=True
        )
        pixels, self.grids = photo_patches(shape.grid)
        with torch.no_grad():
            features = self.plain.model.get_image_features(pixels.to(self.dtype), self.grids)
        self.first = self._request(features, shape.short, shape.long, seed=1)
        self.second = self._request(features, shape.long, shape.short, seed=2)
        self.num_tokens = self.second["input_ids"].shape[1]
        self.past: list[tuple[Tensor, Tensor]] = []
        self.floor_inputs: dict[str, Any] = {}
        self.warm_report: dict[str, Any] = {}

    def _request(self, features: Any, before: int, after: int, seed: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed)
        text = torch.randint(WORDS, self.shape.vocabulary, (before + after,), generator=draw)
        image = torch.full((self.shape.grid[0] * self.shape.grid[1],), IMAGE)
        start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
        ids = torch.cat([text[:before], start, image, end, text[before:]])[None]
        positions, _ = self.plain.model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=self.grids)
        return {
            "input_ids": ids,
            "mm_encoder_outputs": {"image": features},
            "position_ids": positions,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def run(self, after_run: Callable[[], None] = lambda: None) -> TtftResult:
        """Warm up, then measure. ``after_run`` is called ``number_of_runs`` times, after each timed run.

        Raises:
            RuntimeError: a run did not do what its name says.
        """
        # The model checks that placeholders and features agree: without this, that is a graph break.
        with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
            first_calls, difference = self._warm_up()
            seconds = interleave(self.systems(), self.shape.rounds, after_run)
        usual = {name: median(values) for name, values in seconds.items()}
        first_calls["warm"] -= usual["warm"]
        first_calls["cold"] -= usual["cold"]
        first_calls["plain"] -= usual["plain"]
        pairs = [("plain", "warm"), ("eager", "warm"), ("warm", "floor"), ("cold", "plain")]
        start = self.shape.short + 1, self.shape.long + 1
        return TtftResult(
            shape=self.shape,
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=sum(weight.numel() for weight in self.plain.parameters()),
            num_tokens=self.num_tokens,
            vision_tokens=self.shape.grid[0] * self.shape.grid[1],
            starts=start,
            floor_rows=self.floor_inputs["input_ids"].shape[1],
            seconds=seconds,
            first_call_seconds=first_calls,
            ratios={f"{a} / {b}": paired_ratio(seconds[a], seconds[b]) for a, b in pairs},
            cold_difference=difference,
            warm_report=self.warm_report,
        )

    @property
    def number_of_runs(self) -> int:
        """Timed runs in ``run()``."""
        systems = 5
        return (systems - 1) * self.shape.rounds + self.shape.eager_rounds

    def systems(self) -> dict[str, System]:
        """What is timed, in the order of a round: the warm run uses the donor of the cold run before it."""
        return {
            "eager": System(lambda: self.plain(**self.second), rounds=self.shape.eager_rounds),
            "plain": System(lambda: self.compiled(**self.second)),
            "cold": System(lambda: self.reusing(**self.first), self.reusing.vlcache.clear, self._check_cold),
            "warm": System(lambda: self.reusing(**self.second), check=self._check_warm),
            "floor": System(lambda: self.compiled(**self.floor_inputs), prepare=self._fill_cache),
        }

    def _warm_up(self) -> tuple[dict[str, float], float]:
        """Compile everything; seconds of the first calls, and how far cold logits are from plain ones."""
        systems = self.systems()
        first_calls = {name: time_once(systems[name]) for name in ("plain", "cold", "warm")}
        expected = self.compiled(**self.first).logits.float()
        self.reusing.vlcache.clear()
        logits = self.reusing(**self.first).logits.float()
        difference = float((logits - expected).abs().max() / expected.abs().max())
        self._prepare_floor()
        for _ in range(2):
            time_once(systems["warm"])
            time_once(systems["floor"])
        return first_calls, difference

    def _prepare_floor(self) -> None:
        """As many rows as the warm run computes, on a ready cache of all tokens before them."""
        rows = self.warm_report["rows_per_layer"][0]
        cache = self.compiled(**self.second).past_key_values
        self.past = [
            (layer.keys[:, :, :-rows].clone(), layer.values[:, :, :-rows].clone()) for layer in cache.layers
        ]
        self.floor_inputs = {
            "input_ids": self.second["input_ids"][:, -rows:],
            "position_ids": self.second["position_ids"][:, :, -rows:],
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def _fill_cache(self) -> None:
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.past):
            cache.update(keys, values, index)
        self.floor_inputs["past_key_values"] = cache

    def _check_cold(self) -> None:
        report = self.reusing.vlcache.last_report
        if report["mode"] != "cold":
            raise RuntimeError(f"the cold run was {report['mode']}: {report['reason']}")

    def _check_warm(self) -> None:
        report = self.reusing.vlcache.last_report
        if report["mode"] != "warm" or not all(span["hit"] for span in report["spans"]):
            raise RuntimeError(f"the warm run was {report['mode']}: {report['reason']}")
        self.warm_report = report
