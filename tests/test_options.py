"""Options: defaults, checks and messages."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.inserted_pass import InsertedPass
from vlcache_fx.options import Options
from vlcache_fx.passes import Pass, Program
from vlcache_fx.policies.uniform import Uniform
from vlcache_fx.store.memory import MemoryStore


class Nothing(Pass):
    name: ClassVar[str] = "nothing"

    def run(self, program: Program) -> bool:
        return False


def test_parse_defaults() -> None:
    assert dataclasses.asdict(Options.parse({})) == {
        "policy": "layer_aware",
        "budget": 0.02,
        "lowering": "inductor",
        "store": "memory://",
        "capacity_bytes": 4 * 1024**3,
        "profile": None,
        "min_span_tokens": 16,
        "donor_contexts": 4,
        "donor_rank": 0,
        "exact_returns": 0,
        "idle_refinement": 0.0,
        "donor_dtype": "model",
        "shadow": 0.0,
        "shadow_max_kl": 0.1,
        "shadow_max_violations": 3,
        "salt": "",
        "strict": False,
        "cuda_graphs": False,
        "dynamic": None,
        "mode": None,
        "passes": (),
        "dump_graphs": None,
        "dry_run": False,
    }
    assert Options.parse(None) == Options.parse({}) == Options()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "full"),
        ("policy", Uniform()),
        ("budget", 0),
        ("budget", 1),
        ("lowering", "eager"),
        ("store", MemoryStore(1)),
        ("capacity_bytes", 1),
        ("profile", "profile.json"),
        ("profile", Path("profile.json")),
        ("min_span_tokens", 1),
        ("donor_contexts", 1),
        ("donor_rank", 0),
        ("donor_rank", 2),
        ("exact_returns", 3),
        ("idle_refinement", 0.5),
        ("donor_dtype", "int8"),
        ("shadow", 0.01),
        ("shadow_max_kl", None),
        ("shadow_max_kl", 0),
        ("shadow_max_violations", 1),
        ("salt", "tenant"),
        ("strict", True),
        ("dynamic", False),
        ("passes", ()),
        ("passes", (InsertedPass(Nothing(), "warm", after="trim_tail"),)),
        ("dump_graphs", Path("graphs")),
        ("dry_run", True),
        ("mode", "max-autotune"),
        ("mode", "default"),
        ("mode", None),
    ],
)
def test_parse_valid_values(name: str, value: Any) -> None:
    assert getattr(Options.parse({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", ""),
        ("policy", None),
        ("policy", Uniform),
        ("budget", -0.01),
        ("budget", 1.01),
        ("budget", 2),
        ("budget", float("nan")),
        ("budget", float("inf")),
        ("budget", True),
        ("budget", "0.02"),
        ("budget", 1j),
        ("lowering", "onnx"),
        ("lowering", None),
        ("store", None),
        ("store", MemoryStore),
        ("store", 3),
        ("capacity_bytes", 0),
        ("capacity_bytes", -1),
        ("capacity_bytes", 1.5),
        ("capacity_bytes", True),
        ("profile", 3),
        ("profile", ""),
        ("min_span_tokens", 0),
        ("donor_contexts", 0),
        ("donor_contexts", 2.0),
        ("dry_run", 1),
        ("dry_run", "yes"),
        ("donor_rank", 1),
        ("donor_rank", -2),
        ("donor_rank", True),
        ("exact_returns", -1),
        ("exact_returns", 0.5),
        ("idle_refinement", 1.5),
        ("idle_refinement", True),
        ("donor_dtype", "int4"),
        ("donor_dtype", None),
        ("shadow", 2),
        ("shadow", True),
        ("shadow_max_kl", -0.1),
        ("shadow_max_kl", float("nan")),
        ("shadow_max_kl", "0.1"),
        ("shadow_max_violations", 0),
        ("min_span_tokens", "16"),
        ("salt", None),
        ("salt", b"tenant"),
        ("strict", 1),
        ("strict", None),
        ("dynamic", "auto"),
        ("passes", "splice_rows"),
        ("passes", [Nothing()]),
        ("dump_graphs", 1),
        ("mode", "fastest"),
        ("mode", True),
    ],
)
def test_parse_bad_values(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({name: value})
    assert f"{name}={value!r}" in str(caught.value)


def test_parse_unknown_names() -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse({"bugdet": 0.1, "zzz": 1})
    message = str(caught.value)
    assert "'bugdet' (did you mean 'budget'?)" in message
    assert "'zzz'," not in message
    assert "'zzz'" in message
    for field in dataclasses.fields(Options):
        assert field.name in message


def test_parse_numpy_numbers() -> None:
    options = Options.parse({"budget": np.float32(0.5), "capacity_bytes": np.int64(7)})
    assert (type(options.budget), options.budget) == (float, 0.5)
    assert (type(options.capacity_bytes), options.capacity_bytes) == (int, 7)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().budget = 0.5  # type: ignore[misc]


def test_mode_sets_inductor_config_and_cuda_graphs() -> None:
    options = Options.parse({"mode": "max-autotune"})
    assert options.cuda_graphs
    assert options.inductor_config["max_autotune"] is True
    assert not any("cudagraphs" in name for name in options.inductor_config)
    options = Options.parse({"mode": "max-autotune-no-cudagraphs"})
    assert not options.cuda_graphs
    assert options.inductor_config["max_autotune"] is True
    assert Options.parse({}).inductor_config == {}
    with pytest.raises(OptionError, match=r"mode='fastest'.*'reduce-overhead'"):
        Options.parse({"mode": "fastest"})


@pytest.mark.parametrize(
    ("step", "places", "message"),
    [
        (Nothing, {"before": "trim_tail"}, "is not a pass object"),
        ("nothing", {"before": "trim_tail"}, "'nothing' is not a pass"),
        (Nothing(), {}, "'nothing' needs either before= or after="),
        (Nothing(), {"before": "trim_tail", "after": "trim_tail"}, "needs either before= or after="),
    ],
)
def test_inserted_pass_bad_arguments(step: Any, places: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        InsertedPass(step, "warm", **places)


def test_key_salt_covers_inserted_passes() -> None:
    step = Nothing()
    options = [
        Options(salt="a"),
        Options(salt="a", passes=(InsertedPass(step, "warm", after="trim_tail"),)),
        Options(salt="b", passes=(InsertedPass(step, "warm", after="trim_tail"),)),
        Options(salt="a", passes=(InsertedPass(step, "cold", after="trim_tail"),)),
        Options(salt="a", passes=(InsertedPass(step, "warm", before="trim_tail"),)),
        Options(salt="a", passes=(InsertedPass(Nothing(), "warm", after="trim_tail"),)),  # unknown state
    ]
    assert options[0].key_salt == "a"
    assert len({one.key_salt for one in options}) == len(options)
    assert options[1].key_salt == Options(salt="a", passes=options[1].passes).key_salt


@pytest.mark.parametrize("kind", [list, tuple])
def test_store_takes_lists(kind: type) -> None:
    shared = MemoryStore(1)
    options = Options(store=kind(["memory://", "file:///d", shared]))
    assert options.store == ("memory://", "file:///d", shared)
    assert hash(options) == hash(Options(store=("memory://", "file:///d", shared)))


@pytest.mark.parametrize("store", [[], (), [None], ["memory://", 3], ["memory://", []], {"memory://"}, [""]])
def test_bad_lists_of_stores(store: Any) -> None:
    with pytest.raises(OptionError, match=r"file:///folder.*mooncake://host:port.*a list of them"):
        Options(store=store)
