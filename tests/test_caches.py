"""All kinds of KV caches: none, dynamic, static, sliding, quantised; empty, and after earlier turns.

Reuse with all rows recomputed equals the unmodified model, bitwise where the kernels are the same: logits,
contents of the cache at all positions, and the tokens decoded from it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.lowering import EagerLowering
from vlcache_fx.runtime import idle
from vlcache_fx.testing.families import llava_inputs

from .caches import KINDS, Kind, llava, state, static_cache
from .runtime.helpers import Pair, distance, hits, own_compiler_state, with_api, with_backend

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


@dataclass
class Conversation:
    """A conversation with a compiled model and its unmodified copy, each with its own cache.

    Attributes:
        pair: the models.
        caches: cache of the compiled and of the unmodified model; both None for calls without a cache.
        tolerance: tolerance of logits and contents.
        length: number of tokens so far.
        logits: logits of the unmodified model in the last turn.
    """

    pair: Pair
    caches: tuple[Any, Any]
    tolerance: float = 0.0
    length: int = 0
    logits: Tensor | None = None

    def say(self, inputs: dict[str, Tensor], rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Run a turn, compare results and contents of caches, and return the report.

        Args:
            inputs: inputs of the models.
            rows: positions at which logits are compared; by default all.
        """
        self.length += inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(1, self.length, dtype=torch.int64)
        with torch.no_grad(), torch._dynamo.config.patch(DYNAMO_CONFIG):
            got, expected = (
                model(**inputs, past_key_values=cache, use_cache=cache is not None)
                for model, cache in zip((self.pair.model, self.pair.reference), self.caches, strict=True)
            )
        places = slice(None) if rows is None else list(rows)
        assert distance(got.logits[:, places], expected.logits[:, places]) <= self.tolerance
        if self.caches[0] is not None:
            same(*map(state, self.caches), self.tolerance)
        self.logits = expected.logits
        return self.pair.report

    def listen(self, tokens: int = 2) -> None:
        """Decode greedily on the caches; decoding steps have no report.

        Decoding steps have other kernels than prefills, so rounding differs, and stays in the caches.
        """
        self.tolerance = max(self.tolerance, 1e-6)
        before = self.pair.engine.stats()["calls"], self.pair.engine.last_report
        for _ in range(tokens):
            assert self.logits is not None
            self.say({"input_ids": self.logits[:, -1:].argmax(-1)})
        assert (self.pair.engine.stats()["calls"], self.pair.engine.last_report) == before


def same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        want = expected[name]
        if isinstance(value, Tensor):
            assert value.shape == want.shape, name
            # Rounding to int8 may differ by one.
            off = float((value.to(torch.float64) - want.to(torch.float64)).abs().max())
            assert off <= (tolerance if value.is_floating_point() else bool(tolerance)), (name, off)
        else:
            assert value == want, name


def prompt(before: int, *images: int, seed: int = 0) -> dict[str, Tensor]:
    return llava_inputs(before, 5, images, text_seed=seed)


def conversations(kind: Kind, door: Callable[..., Pair], **options: Any) -> Callable[[], Conversation]:
    """Return a function that starts conversations with a compiled model and its unmodified copy."""
    pair = door(kind.model(), policy="full", **options)
    if kind.traced:
        pair.reference.forward = torch.compile(pair.reference.forward, backend="eager", dynamic=True)
    config = pair.reference.config
    tolerance = 0.0 if options.get("lowering", "eager") == "eager" else TOLERANCE
    return lambda: Conversation(pair, (kind.cache(config), kind.cache(config)), tolerance)


def check_turns(start: Callable[[], Conversation]) -> None:
    first = start()
    assert first.say(prompt(4, 0))["mode"] == "cold"
    # A new image after it, computed on the keys of the first turn.
    assert first.say(prompt(7, 1, seed=1))["mode"] == "cold"

    second = start()
    report = second.say(prompt(11, 0, seed=2))
    assert (report["mode"], hits(report)) == ("warm", [True])
    second.listen()
    # The first image again, at another offset.
    report = second.say(prompt(2, 0, seed=3))
    assert (report["mode"], hits(report)) == ("warm", [True])
    assert report["rows_per_layer"][0] == report["num_tokens"] == 43
    second.listen(1)
    engine = first.pair.engine
    assert engine.refusals == []
    assert engine.stats()["calls"] == {"cold": 2, "warm": 2, "bypass": 0}

    # A probing policy runs the program twice; caches are written, and lengths counted, once.
    third = start()
    with engine.using(policy="cacheblend", budget=1.0):
        report = third.say(prompt(9, 0, seed=4))
    assert (report["mode"], "probe" in report["timings_ms"]) == ("warm", True)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.works("Caches", name), *[pytest.mark.thorough] * (name != "dynamic")]
        )
        for name in (
            "dynamic",
            "int8 per token",
            "static, sliding",
            "hybrid",
            "static, allocated",
            "int8 per channel, read back",
        )
    ],
)
def test_turns_with_compile(name: str) -> None:
    check_turns(conversations(KINDS[name], with_api))


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "dynamic"), [("static, hybrid", True), ("int8 per channel", None)])
def test_turns_with_backend(name: str, dynamic: bool | None) -> None:
    check_turns(conversations(KINDS[name], with_backend, dynamic=dynamic))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["hybrid", "static"])
def test_turns_with_inductor(name: str) -> None:
    check_turns(conversations(KINDS[name], with_api, lowering="inductor"))


@pytest.mark.slow
@pytest.mark.thorough  # test_decoding.py::test_step_writes_static_cache_in_place compiles it, too
def test_static_cache_with_inductor() -> None:
    """Only the cold program: each further program takes half a minute to compile."""
    talk = conversations(KINDS["static"], with_api, lowering="inductor", dynamic=True)()
    assert talk.say(prompt(4, 0))["mode"] == "cold"
    assert talk.pair.engine.refusals == []


# Without a cache, tests/test_backend.py goes through the other door.
@pytest.mark.parametrize("door", [with_api, pytest.param(with_backend, marks=pytest.mark.thorough)])
def test_prefill_without_cache(door: Callable[..., Pair]) -> None:
    start = conversations(Kind(llava, lambda _: None), door)
    for before, mode in [(4, "cold"), (9, "warm"), (2, "warm")]:
        assert start().say(prompt(before, 0, seed=before))["mode"] == mode


@pytest.mark.works("Caches", "prefill in chunks on one cache")
def test_chunked_prefill() -> None:
    """Text, an image and a question in three calls on one cache."""
    start = conversations(KINDS["dynamic"], with_api)
    start().say(prompt(4, 0))
    chunks = start()
    assert chunks.say({"input_ids": torch.arange(20, 29)[None]})["mode"] == "bypass"  # text alone
    assert chunks.say(prompt(0, 0))["mode"] == "warm"
    engine, report = chunks.pair.engine, chunks.pair.report
    calls = engine.stats()["calls"]["bypass"]
    # The question continues the prompt; the report of the image stays.
    assert chunks.say({"input_ids": torch.arange(40, 52)[None]}) == report
    assert engine.stats()["calls"]["bypass"] == calls + 1
    chunks.listen()
    assert engine.refusals == []


# Small budgets ----------------------------------------------------------------------------------------------


class Donated:
    """An unmodified model that can read some rows of a span from another call, before positions enter.

    A reference for reuse: all rows are computed, and keys and values of rows outside the plan are replaced.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: slice | None = None
        self.records = False
        self.stored: dict[int, Tensor] = {}
        for layer in model.model.language_model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.register_forward_hook(self._projected)

    def _projected(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        if self.rows is None or output.shape[1] == 1:
            return None
        if self.records:
            self.stored[id(module)] = output[:, self.rows].clone()
            return None
        replaced = output.clone()
        replaced[:, self.rows] = self.stored[id(module)]
        return replaced


@pytest.mark.parametrize(
    ("name", "past"),
    [
        # Between a cache with a past and none at all, as in test_any_decoder.py.
        pytest.param("dynamic", False, marks=pytest.mark.thorough),
        ("dynamic", True),
        pytest.param("sliding", True, marks=pytest.mark.thorough),
        pytest.param("static, allocated", True, marks=pytest.mark.thorough),
        pytest.param("static, sliding", False, marks=pytest.mark.thorough),
        ("int8 per token", True),
    ],
)
def test_small_budget_equals_same_rows(name: str, past: bool) -> None:
    kind = KINDS[name]
    pair = with_api(kind.model(), policy="first_k", budget=0.1)
    config = pair.reference.config
    start = 3
    computed = 3  # of 36
    donated = Donated(pair.reference)

    def conversation() -> Conversation:
        return Conversation(pair, (kind.cache(config), kind.cache(config)), TOLERANCE)

    donated.rows, donated.records = slice(8 + computed, 8 + 36), True
    assert conversation().say(prompt(8, 0))["mode"] == "cold"
    donated.rows, donated.records = None, False

    talk = conversation()
    if past:
        assert talk.say(prompt(5, 1, seed=1))["mode"] == "cold"
    exact = kind.cache(config)
    with torch.no_grad():
        if past:
            pair.reference(**prompt(5, 1, seed=1), past_key_values=exact)
        unmodified = pair.reference(
            **prompt(start, 0, seed=2) | {"attention_mask": None}, past_key_values=exact
        ).logits
    donated.rows = slice(start + computed, start + 36)
    report = talk.say(
        prompt(start, 0, seed=2), rows=[*range(start + computed), *range(start + 36, start + 41)]
    )
    assert report["mode"] == "warm"
    assert report["rows_per_layer"] == (start + computed + 5,) * 3
    assert talk.logits is not None
    assert not torch.allclose(talk.logits, unmodified, rtol=0, atol=1e-3)  # approximate
    talk.listen()


def test_no_donors_recorded_after_past() -> None:
    """The past may contain reused keys, so later rows are not known to be exact."""
    start = conversations(KINDS["dynamic"], with_api)
    engine, talk = start().pair.engine, start()
    talk.say(prompt(4, 0))
    stored = engine.stats()["store"]["entries"]
    for seed in (1, 2, 3):
        assert talk.say(prompt(4, 1, seed=seed))["mode"] == "cold"
        features = int(seed == 1)  # the encoder's output is cached
        assert engine.stats()["store"]["entries"] == stored + features
        stored += features
    assert start().say(prompt(6, 1, seed=4))["mode"] == "cold"
    assert engine.stats()["store"]["entries"] > stored
    assert start().say(prompt(9, 1, seed=5))["mode"] == "warm"


def test_idle_work_leaves_caches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes to caches of its own, also where programs update them in place."""
    monkeypatch.setattr(idle, "QUIET_S", 0.02)
    kind = KINDS["static"]
    pair = with_api(kind.model(), policy="first_k", budget=0.1, idle_refinement=1.0)
    caches = []
    with pair.engine.idle.request():  # until the caches are as the calls left them
        for text in (4, 9):
            own = kind.cache(pair.reference.config), kind.cache(pair.reference.config)
            report = Conversation(pair, own, tolerance=1e9).say(prompt(text, 0, seed=text))
            caches.append(own[0])
        assert report["mode"] == "warm"
        before = copy.deepcopy([state(cache) for cache in caches])
    assert pair.engine.idle.wait(60)
    assert pair.engine.stats()["idle_refinements"] == 1
    pair.engine.close()
    for cache, expected in zip(caches, before, strict=True):
        same(state(cache), expected, 0.0)


def test_no_prefix_reused_after_past() -> None:
    """Equal tokens after another past have other rows."""
    kind = KINDS["dynamic"]
    pair = with_api(kind.model(), policy="first_k", budget=0.1)
    config = pair.reference.config

    def start() -> Any:
        return Conversation(pair, (kind.cache(config), kind.cache(config)), tolerance=1e9)

    start().say(prompt(4, 0))
    assert start().say(prompt(4, 0))["prefix_tokens"] == 45
    talk = start()
    talk.say(prompt(9, 0, seed=1))
    report = talk.say(prompt(4, 0))
    assert (report["mode"], report["prefix_tokens"]) == ("warm", 0)


@pytest.mark.parametrize("name", ["static, allocated"])
def test_empty_static_cache_is_no_past(name: str) -> None:
    """The mask hides its empty positions: donors are recorded, and an identical prefix is exact."""
    kind = KINDS[name]
    pair = with_api(kind.model(), policy="first_k", budget=0.1)
    config = pair.reference.config

    def start() -> Any:
        return Conversation(pair, (kind.cache(config), kind.cache(config)), TOLERANCE)

    talk = start()
    assert talk.say(prompt(4, 0))["mode"] == "cold"
    for _ in range(2):
        again = start()
        report = again.say(prompt(4, 0))
        assert (report["mode"], report["prefix_tokens"]) == ("warm", 45)
        assert report["rows_per_layer"][0] == 2
    again.tolerance = 1e9
    assert again.say(prompt(4, 0))["prefix_tokens"] == 0  # not empty any more


class Step(nn.Module):
    """A decoding step of a layer that writes to a cache and to a recurrent state.

    Attributes:
        kind: ``returned``: the step returns a part of each as well. ``another form``: its attention is not
            canonical.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.project = kind, nn.Linear(8, 8)

    def forward(self, x: Tensor, keys: Tensor, state: Tensor, place: Tensor) -> Any:
        heads = self.project(x)[:, None]
        keys[:, :, place] = heads.sin()
        state.mul_(0.5).add_(x)
        if self.kind == "another form":
            return x + ((heads @ keys.mT).softmax(-1) * 0.5 @ keys)[:, 0] + state
        y = x + F.scaled_dot_product_attention(heads, keys, keys)[:, 0] + state
        return (y, keys[:, :, :3], state[..., :2]) if self.kind == "returned" else y


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["returned", "another form"])
def test_decoding_steps_log_nothing(kind: str, strict: bool) -> None:
    """Refused or not, decoding steps log nothing."""
    pair = with_api(Step(kind), strict=strict)
    ours, theirs = ([torch.ones(1, 1, 16, 8), torch.ones(1, 1, 8)] for _ in range(2))
    for place in range(3):
        x, at = torch.full((1, 1, 8), place + 0.5), torch.tensor([place])
        with torch.no_grad():
            got, expected = pair.model(x, *ours, at), pair.reference(x, *theirs, at)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert all(map(torch.equal, ours, theirs))
    assert pair.engine.last_report is None
    assert pair.engine.refusals == []


# Entry points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_written", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_failing_program_keeps_cache(has_written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start = conversations(KINDS["static, allocated"], with_api)
    start().say(prompt(4, 0))
    plainly = EagerLowering.lower

    def lower(self: EagerLowering, program: Any, *, name: str) -> Any:
        run = plainly(self, program, name=name)

        def fails(args: Any) -> Any:
            if has_written:
                run(args)
            raise RuntimeError("deliberate")

        return fails

    monkeypatch.setattr(EagerLowering, "lower", lower)
    talk = start()
    assert talk.say(prompt(6, 0, seed=1))["mode"] == "bypass"  # length and rows are written once
    talk.listen()


# test_turns_with_compile has turns; runtime/requests/test_blocks.py generates on an earlier turn's cache.
@pytest.mark.thorough
@pytest.mark.works("Caches", "a conversation on one cache by `generate()`")
@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_over_several_turns(implementation: str | None) -> None:
    pair = with_api(llava(), policy="full")
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    for place in range(2):
        caches: list[Any] = [None, None]
        asked = torch.empty(1, 0, dtype=torch.int64)
        for turn, mode in enumerate(["cold" if place == 0 else "warm", "warm"]):
            new = prompt(4 + 3 * place + turn, 0, seed=place + turn)
            asked = torch.cat([asked, new["input_ids"]], 1)
            results = []
            for index, model in enumerate((pair.model, pair.reference)):
                cache = caches[index]
                if cache is None and implementation is not None:
                    cache = static_cache(pair.reference.config)
                inputs = new | {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
                results.append(model.generate(**inputs, past_key_values=cache, **options))
                caches[index] = results[-1].past_key_values
            got, expected = results
            assert pair.report["mode"] == mode
            assert pair.report["num_tokens"] == new["input_ids"].shape[1] + (
                turn > 0
            )  # and the last answer token
            assert torch.equal(got.sequences, expected.sequences)
            for a, b in zip(got.logits, expected.logits, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)
            same(state(caches[0]), state(caches[1]), TOLERANCE)
            asked = got.sequences
    assert pair.engine.refusals == []
