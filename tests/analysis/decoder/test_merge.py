"""Merges, deepstack features, and the nodes that compute features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.decoder.merge import find_merges, sites_after
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..graphs import attend, capture, captured_vlm


def test_find_merges_single() -> None:
    captured = captured_vlm()
    facts = analyze(captured)
    (merge,) = facts.merges
    assert str(merge.embeddings.target) == "aten.embedding.default"
    assert str(merge.features.target) == "aten.linear.default"
    assert merge.mask.meta["val"].dtype is torch.bool
    assert merge.node is facts.stream.boundaries[0]


def two_modalities(x: Tensor, images: Tensor, videos: Tensor, kinds: Tensor, encoder: nn.Module) -> Tensor:
    x = x.masked_scatter((kinds == 1)[..., None], attend(encoder(images)[None], is_causal=False)[0])
    x = x.masked_scatter((kinds == 2)[..., None], encoder(videos))
    x = x + attend(x)
    return (x + attend(x))[:, -1]


def test_find_merges_two_modalities() -> None:
    call = {
        "x": torch.randn(1, 6, 4),
        "images": torch.randn(2, 4),
        "videos": torch.randn(1, 4),
        "kinds": torch.tensor([[0, 1, 1, 0, 2, 0]]),
    }
    captured = capture(two_modalities, call, encoder=nn.Linear(4, 4))
    sites = find_sites(captured.graph_module.graph)
    merges = find_merges(captured.graph_module.graph, sites)
    assert (len(sites), len(merges)) == (3, 2)
    assert merges[1].embeddings is merges[0].node
    assert sites_after(sites, merges) == sites[1:]
    facts = analyze(captured)
    assert facts.num_layers == 2
    assert facts.stream.boundaries[0] is merges[1].node
    assert {merges[0].features, merges[1].features} <= set(facts.encoder)
    assert sites[0].node in facts.encoder


def updated_rows(x: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    x = x.masked_scatter(mask[..., None], features)
    x = x.masked_scatter(mask[..., None], x * 2)
    return (x + attend(x))[:, -1]


def test_rows_of_the_embeddings_are_no_features() -> None:
    mask = torch.tensor([[False, True, True, False]])
    call = {"x": torch.randn(1, 4, 4), "features": torch.randn(2, 4), "mask": mask}
    graph = capture(updated_rows, call).graph_module.graph
    (merge,) = find_merges(graph, find_sites(graph))
    assert merge.features.op == "placeholder"


def test_find_merges_none() -> None:
    captured, _ = captured_graph(tiny_vlm(), tiny_vlm_inputs(4, 3, []))
    facts = analyze(captured)
    assert facts.merges == ()
    assert facts.encoder == ()
    assert facts.stream.boundaries[0].op != "placeholder"
    assert sites_after(find_sites(captured.graph_module.graph), ()) == find_sites(captured.graph_module.graph)


def test_find_merges_without_attention() -> None:
    def unread(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_scatter(mask, x), attend(x) + x

    call = {"x": torch.ones(1, 3, 4), "mask": torch.ones(1, 3, 4, dtype=torch.bool)}
    graph = capture(unread, call).graph_module.graph
    assert find_merges(graph, find_sites(graph)) == ()


def deepstack(ids: Tensor, mask: Tensor, pixels: Tensor, embed: nn.Module, encoder: nn.Module) -> Tensor:
    """Merged features, and others that are added after the first layer."""
    features = encoder(pixels)
    x = embed(ids).masked_scatter(mask[..., None], features)
    x = x + attend(x)
    x = x.clone()
    x[mask, :] = x[mask, :] + features.tanh()
    return x + attend(x)


@pytest.mark.parametrize("dynamic", [None, True])
def test_find_deepstack(dynamic: bool | None) -> None:
    mask = torch.tensor([[False, True, True, False, False]])
    call = {"ids": torch.tensor([[1, 2, 3, 4, 5]]), "mask": mask, "pixels": torch.randn(2, 4)}
    parts = {"embed": nn.Embedding(9, 4), "encoder": nn.Linear(4, 4)}
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        captured = capture(deepstack, call, dynamic, **parts)
    facts = analyze(captured)
    (entry,) = facts.deepstack
    assert entry.node.target is torch.ops.vlcache.scatter_rows.default
    assert str(entry.features.target) == "aten.tanh.default"
    assert entry.mask.op == "placeholder"
    assert facts.num_layers == 2
    assert entry.node not in facts.stream.nodes  # gathered like any table over all tokens
    assert {entry.features, facts.merges[0].features} <= set(facts.encoder)


def test_find_deepstack_none() -> None:
    assert analyze(captured_vlm()).deepstack == ()
