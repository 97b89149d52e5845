"""Cut the encoder out of a graph that has it together with the decoder, so that a hit can skip it."""

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.frontier import packet_of
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.capture.subgraph import extract, needed_for

aten = torch.ops.aten

COMPUTES = frozenset(
    {aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.conv2d, aten.conv3d, aten.convolution}
    | {aten.scaled_dot_product_attention}
)
"""Ops that make a region worth skipping."""


@dataclass(frozen=True)
class SplitEncoder:
    """An encoder and the decoder that reads its results as inputs.

    Attributes:
        encoder: from the original graph's inputs to the tensors that the rest reads.
        inputs: indices of the request's data (tensors and sizes) that the encoder depends on.
        weights: indices of its weights.
        decoder: the rest; the encoder's results are data inputs behind the original ones.
        computes: False where the region only joins or converts what an encoder outside the graph gave.
    """

    encoder: fx.GraphModule
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    decoder: Captured
    computes: bool


def split_encoder(captured: Captured, facts: DecoderFacts) -> SplitEncoder | None:
    """Split ``captured`` (which stays as it is) along the encoder region; None where features are
    graph inputs already."""
    region = dict.fromkeys(facts.encoder)
    if not region:
        return None
    results = [
        node for node in region if any(user not in region and user.op != "output" for user in node.users)
    ]
    results += [n for n in region if n not in results and any(user.op == "output" for user in n.users)]
    placeholders = captured.placeholders
    needed = needed_for(results)
    used = [index for index, node in enumerate(placeholders) if node in needed]
    kinds = captured.kinds
    return SplitEncoder(
        encoder=extract(captured.graph_module, results),
        inputs=tuple(index for index in used if kinds[index] is not InputKind.WEIGHT),
        weights=tuple(index for index in used if kinds[index] is InputKind.WEIGHT),
        decoder=_rest(captured, results),
        computes=any(packet_of(node) in COMPUTES for node in region),
    )


def _rest(captured: Captured, results: list[Node]) -> Captured:
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    last = captured.placeholders[-1]
    inputs = dict.fromkeys(results)
    for node in captured.graph_module.graph.nodes:
        if node not in inputs:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is last:
            for index, result in enumerate(results):
                copies[result] = graph.placeholder(f"features_{index}")
                copies[result].meta["val"] = result.meta["val"]
    graph.eliminate_dead_code()
    graph.lint()
    kinds = (*captured.kinds, *[InputKind.DATA] * len(results))
    return Captured(fx.GraphModule(captured.graph_module, graph), kinds, captured.specialised)
