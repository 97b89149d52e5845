"""Many models of equal weights share a store: none reuses rows of a model that computes something else.

Everything except weights is mutated at random: constants, hooks, buffers, activations, the order of two
operators, rotary embeddings, windows, heads, positions, autocast. Results of each model must be the same with
the shared store as with a store of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.eviction import COST_MS
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .runtime.helpers import Pair, own_compiler_state, with_api, with_backend

Mutation = Callable[[Any], None]

CALLS = (
    tiny_vlm_inputs(7, 5, [(20, 0)], text_seed=1),
    tiny_vlm_inputs(12, 6, [(20, 0)], text_seed=2),
    tiny_vlm_inputs(12, 6, [(20, 0)], text_seed=2),
    tiny_vlm_inputs(7, 5, [(20, 1), (20, 0)], text_seed=3),
)
"""An image, the same image after another prompt, the first prompt again, and after another image."""

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "times 2": lambda y: y * 2,
    "times 3": lambda y: y * 3,
    "times 2.0": lambda y: y * 2.0,
    "plus 1, times 2": lambda y: (y + 1) * 2,
    "times 2, plus 1": lambda y: y * 2 + 1,
    "to the third": lambda y: y**3,
    "rolled": lambda y: y.roll(1, -1),
    "flipped": lambda y: y.flip(-1),
    "halves swapped": lambda y: torch.cat([y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1),
    "interleaved": lambda y: y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
    "in bfloat16": lambda y: y.bfloat16().float(),
    "clamped": lambda y: y.clamp(min=-1),
    "without the first": lambda y: torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:]], -1),
    "without the last": lambda y: torch.cat([y[..., :-1], torch.zeros_like(y[..., :1])], -1),
}

PLACES = ("encoder", "embed", "decoder.layers.0.mlp", "decoder.layers.1.attention", "decoder.layers.0.norm_1")
PLACES += ("decoder.layers.0.attention.key", "decoder.layers.1.attention.value", "decoder.layers.0")


def hooked(place: str, change: str) -> Mutation:
    return lambda model: model.get_submodule(place).register_forward_hook(lambda m, x, y: CHANGES[change](y))


def positions(change: Callable[[Tensor], Tensor]) -> Mutation:
    def mutate(model: Any) -> None:
        model.decoder.register_forward_pre_hook(
            lambda module, args: (args[0], change(torch.arange(args[0].shape[1])))
        )

    return mutate


def shaped(**changes: Any) -> Mutation:
    def mutate(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "shape"):
                module.shape = replace(module.shape, **changes)

    return mutate


def buffered(place: str, scale: float) -> Mutation:
    def mutate(model: Any) -> None:
        module = model.get_submodule(place)
        name = f"scale_{len(list(module.buffers(recurse=False)))}"
        module.register_buffer(name, torch.tensor(scale))
        module.register_forward_hook(lambda module, args, result: result * getattr(module, name))

    return mutate


def activation(kind: type[nn.Module]) -> Mutation:
    def mutate(model: Any) -> None:
        model.encoder[1] = kind()

    return mutate


def epsilon(value: float) -> Mutation:
    def mutate(model: Any) -> None:
        model.decoder.layers[1].norm_2.eps = value

    return mutate


MUTATIONS = st.one_of(
    st.builds(hooked, st.sampled_from(PLACES), st.sampled_from(sorted(CHANGES))),
    st.builds(buffered, st.sampled_from(PLACES[:5]), st.sampled_from([2.0, 3.0])),
    st.builds(epsilon, st.sampled_from([1e-2, 1e-1])),
    st.builds(activation, st.sampled_from([nn.SiLU, nn.Tanh])),
    st.builds(
        positions, st.sampled_from([lambda p: p * 2, lambda p: p * 3, lambda p: p // 2, lambda p: p + 4])
    ),
    st.builds(
        lambda change: shaped(**change),
        st.sampled_from(
            [
                {"rope": "interleaved"},
                {"rope": "partial"},
                {"rope": "none"},
                {"norm_place": "branch"},
                {"norm_place": "post"},
                {"parallel": True},
                {"embed_scale": True},
                {"window": 6},
                {"window": 9},
                {"window": 6, "window_every": 2},
                {"heads": 4, "kv_heads": 2},
                {"explicit_mask": True},
                {"attention": "math", "softcap": 0.5},
                {"attention": "math", "softcap": 2.0},
            ]
        ),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def run(pair: Pair, store: MemoryStore) -> tuple[list[Tensor], list[str]]:
    """Return the result of each call with ``store``, and its mode."""
    found, modes = [], []
    pair.engine.store = store
    pair.engine.missed.clear()
    for call in CALLS:
        found.append(pair.model(**call))
        modes.append(pair.report["mode"])
    return found, modes


def context_of(entry: Entry) -> dict[str, Any]:
    """What an entry says of itself, without the time that it took to compute."""
    return {name: value for name, value in entry.info.items() if name != COST_MS}


def check_entries(own: MemoryStore, shared: MemoryStore) -> int:
    """Check that entries with equal keys and contexts have equal rows; return their number."""
    common = 0
    for key in [listed.key for listed in own.entries()]:
        entry, other = own.get(key), shared.get(key)
        assert entry is not None
        if other is not None and context_of(other) == context_of(entry):
            common += 1
            assert other.tensors.keys() == entry.tensors.keys()
            assert all(torch.equal(entry.tensors[name], other.tensors[name]) for name in entry.tensors)
    return common


class Checked:
    """Counts of comparisons."""

    def __init__(self) -> None:
        self.store, self.models, self.entries = MemoryStore(1 << 30), 0, 0

    def check(
        self, mutations: list[Mutation], autocast: bool, policy: str, make: Callable[..., Pair]
    ) -> None:
        model: Any = tiny_vlm(last_only=False)
        for mutate in mutations:
            mutate(model)
        model.encoder.register_forward_hook(
            lambda module, x, y: y.float()
        )  # autocast does not change embeddings
        own = MemoryStore(1 << 30)
        pair = make(model, policy=policy, store=own)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, first = run(pair, own)
            given, modes = run(pair, self.store)
            expected = [pair.reference(**call) for call in CALLS]
        torch._dynamo.reset()
        is_refused = first[0] == "bypass"  # an operator that is not known to be token-wise
        assert first[0] == "cold" or set(first) == {"bypass"}
        # The same prompt only: after another prompt, halved positions can give the item another key.
        assert modes[2] == ("bypass" if is_refused else "warm")
        self.entries += check_entries(own, self.store)
        self.models += 1
        if policy == "full":
            assert all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


@pytest.mark.parametrize("count", [8, pytest.param(150, marks=pytest.mark.thorough)])
def test_models_never_share_other_weights(count: int, request: pytest.FixtureRequest) -> None:
    checked = Checked()
    checked.check([], False, "full", with_backend)

    @given(
        st.lists(MUTATIONS, min_size=1, max_size=2),
        st.booleans(),
        st.sampled_from(["full", "none"]),
        st.sampled_from([with_api, with_backend]),
    )
    @settings(max_examples=count, phases=[Phase.explicit, Phase.generate])
    def mutated(mutations: list[Mutation], autocast: bool, policy: str, make: Callable[..., Pair]) -> None:
        checked.check(mutations, autocast, policy, make)

    mutated()
    text = f"{checked.models} models, {checked.entries} entries compared with those of others"
    request.node.user_properties.append(("compared", text))
    print(text)  # noqa: T201 - with -s, the figures
