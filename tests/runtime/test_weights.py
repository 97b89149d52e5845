"""Keys cover weights and salt: changed weights find no donors, equal weights share donors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from .helpers import Pair, hits, keys, vlcache_store, with_backend

LAYERS = 2


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="none")


@pytest.fixture
def vlm(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(before: int = 5, seed: int = 0) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, 6, [(24, 0)], text_seed=seed)


def key_weight(model: Any) -> nn.Parameter:
    return model.decoder.layers[1].attention.key.weight


def in_place(model: Any) -> None:
    with torch.no_grad():
        key_weight(model).add_(0.05)


def through_data(model: Any) -> None:
    key_weight(model).data.mul_(1.5)


def replaced_data(model: Any) -> None:
    key_weight(model).data = key_weight(model).data * 1.5


def merged_adapter(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for layer in model.decoder.layers:
        for module in (layer.attention.query, layer.attention.value):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            module.weight.data += 0.1 * (up @ down)


def loaded(model: Any) -> None:
    model.load_state_dict(tiny_vlm(num_layers=LAYERS, seed=7).state_dict())


def norm_alone(model: Any) -> None:
    with torch.no_grad():
        model.decoder.layers[0].norm_1.weight[3] = 9.0


CHANGES: list[Callable[[Any], None]] = [
    in_place, through_data, replaced_data, merged_adapter, loaded, norm_alone
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_find_no_donor(vlm: Pair, change: Callable[[Any], None]) -> None:
    _, before = vlm.run(**prompt())
    _, warm = vlm.run(**prompt(9, seed=1))
    assert hits(warm) == [True]
    old = copy.deepcopy(vlm.reference.state_dict())
    change(vlm.model)
    change(vlm.reference)
    off, after = vlm.run(**prompt())
    assert hits(after) == [False]
    assert after["mode"] == "cold"
    assert keys(after) != keys(before)
    assert off == 0.0
    assert hits(vlm.run(**prompt(9, seed=1))[1]) == [True]
    # The old weights find the old donor again.
    vlm.model.load_state_dict(old)
    vlm.reference.load_state_dict(old)
    _, back = vlm.run(**prompt())
    assert keys(back) == keys(before)
    assert hits(back) == [True]


def test_other_encoder_has_other_keys(vlm: Pair) -> None:
    vlm.run(**prompt())
    for model in (vlm.model, vlm.reference):
        with torch.no_grad():
            model.encoder[0].weight.mul_(1.25)
    off, report = vlm.run(**prompt())
    assert report["encoder_hit"] is False
    assert hits(report) == [False]
    assert off == 0.0


def test_other_weights_share_no_donors() -> None:
    store = vlcache_store()
    pairs = [
        with_backend(tiny_vlm(num_layers=LAYERS, seed=seed, last_only=False), store=store, policy="none")
        for seed in (0, 1)
    ]
    assert pairs[0].engine is pairs[1].engine
    seen = set()
    for pair in pairs:
        off, report = pair.run(**prompt())
        assert hits(report) == [False]
        assert report["encoder_hit"] is False
        assert off == 0.0
        seen.update(keys(report))
    assert len(seen) == 2


def test_equal_weights_share_donors() -> None:
    """Between engines, and between static and dynamic graphs."""
    store = vlcache_store()
    model = tiny_vlm(num_layers=LAYERS, last_only=False)
    first = with_backend(copy.deepcopy(model), store=store, policy="full", dynamic=True)
    second = with_backend(copy.deepcopy(model), store=store, policy="full", budget=0.5, dynamic=None)
    assert first.engine is not second.engine
    _, cold = first.run(**prompt())
    off, warm = second.run(**prompt(9, seed=1))  # its first call: a static graph
    assert hits(warm) == [True]
    assert warm["encoder_hit"] is True
    assert keys(warm) == keys(cold)
    assert off == 0.0
    off, warm = second.run(**prompt(12, seed=2))  # compiled again, with symbols
    assert hits(warm) == [True]
    assert off == 0.0
    other = tiny_vlm_inputs(4, 6, [(31, 5)])
    assert hits(second.run(**other)[1]) == [False]
    off, warm = first.run(**other)
    assert hits(warm) == [True]
    assert off == 0.0


def test_donors_of_static_graph_serve_dynamic_graph() -> None:
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="full", dynamic=None)
    _, static = pair.run(**prompt())
    off, dynamic = pair.run(**prompt(13, seed=1))
    assert keys(static) == keys(dynamic)
    assert hits(dynamic) == [True]
    assert off == 0.0


def test_salts_separate_donors() -> None:
    store = vlcache_store()
    model = tiny_vlm(num_layers=LAYERS, last_only=False)
    tenants = [
        with_backend(copy.deepcopy(model), store=store, policy="none", salt=salt) for salt in ("a", "b")
    ]
    seen = set()
    for tenant in tenants:
        _, report = tenant.run(**prompt())
        assert hits(report) == [False]
        assert report["encoder_hit"] is False
        seen.update(keys(report))
        assert hits(tenant.run(**prompt(9))[1]) == [True]
    assert len(seen) == 2


def test_other_architecture_shares_no_donors() -> None:
    """Equal weights, but layers compute other functions of them."""
    store = vlcache_store()
    plain = tiny_vlm(num_layers=LAYERS, last_only=False)
    parallel = tiny_vlm(num_layers=LAYERS, last_only=False, parallel=True)
    post = tiny_vlm(num_layers=LAYERS, last_only=False, norm_place="branch")
    parallel.load_state_dict(plain.state_dict())
    post.load_state_dict(plain.state_dict())
    for model in (plain, parallel, post):
        pair = with_backend(model, store=store, policy="none")
        off, report = pair.run(**prompt())
        assert hits(report) == [False]
        assert off == 0.0


def test_keys_cover_norm_epsilon() -> None:
    store = vlcache_store()
    for epsilon in (1e-6, 0.1):
        model = tiny_vlm(num_layers=LAYERS, last_only=False)
        for module in model.modules():
            if isinstance(module, nn.RMSNorm):
                module.eps = epsilon
        off, report = with_backend(model, store=store, policy="none").run(**prompt())
        assert hits(report) == [False]
        assert off == 0.0
