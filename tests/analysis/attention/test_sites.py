"""Attention sites of calls in several forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis.attention.sites import find_sites, site_of

from ..graphs import capture, captured_vlm

X = torch.ones(1, 2, 6, 4)


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_sites_causal_gqa(dynamic: bool | None) -> None:
    sites = find_sites(captured_vlm(dynamic=dynamic).graph_module.graph)
    assert len(sites) == 2
    for site in sites:
        assert (site.mask, site.is_causal, site.scale, site.enable_gqa) == (None, True, None, True)
        assert site.is_prefill
        assert site.node.args[:3] == (site.query, site.key, site.value)


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_sites_mask_and_repeated_heads(dynamic: bool | None) -> None:
    sites = find_sites(captured_vlm(dynamic=dynamic, explicit_mask=True).graph_module.graph)
    assert len(sites) == 2
    for site in sites:
        assert site.mask is not None
        assert site.mask.meta["val"].dtype is torch.bool
        assert (site.is_causal, site.enable_gqa) == (False, True)  # clean-up has folded the repeated heads
        assert (site.key.meta["val"].shape[1], site.query.meta["val"].shape[1]) == (1, 2)
    assert sites[0].mask is sites[1].mask


def test_find_sites_scale_and_bidirectional() -> None:
    def bidirectional(x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, scale=0.25)

    (site,) = find_sites(capture(bidirectional, {"x": X}).graph_module.graph)
    assert (site.mask, site.is_causal, site.scale) == (None, False, 0.25)
    assert site.is_prefill


@pytest.mark.parametrize("dynamic", [None, True])
def test_is_prefill_past_keys(dynamic: bool | None) -> None:
    def step(x: Tensor, past: Tensor) -> Tensor:
        keys = torch.cat([past, x], 2)
        return nn.functional.scaled_dot_product_attention(x, keys, keys)

    captured = capture(step, {"x": X, "past": torch.ones(1, 2, 5, 4)}, dynamic=dynamic)
    (site,) = find_sites(captured.graph_module.graph)
    assert not site.is_prefill


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_sites_caps_and_sinks(dynamic: bool | None) -> None:
    captured = captured_vlm(dynamic=dynamic, attention="math", softcap=1.5, sinks=True)
    sites = find_sites(captured.graph_module.graph)
    assert len(sites) == 2
    for site in sites:
        assert str(site.node.target) == "vlcache.attend.default"
        assert site.mask is not None
        assert site.sinks is not None
        assert site.sinks.meta["val"].shape == (2,)
        assert (site.softcap, site.is_causal, site.enable_gqa) == (1.5, False, True)
        assert site.scale == pytest.approx(8**-0.5)
        assert site.is_prefill
        assert site_of(site.node) == site
    assert sites[0].mask is sites[1].mask


def test_find_sites_without_attention() -> None:
    assert find_sites(capture(lambda x: x.softmax(-1) @ x.mT, {"x": X}).graph_module.graph) == ()
