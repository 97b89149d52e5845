"""Builds the specs of input values: values that enter keys besides spans and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from vlcache_fx.analysis.decoder.computation import Leaf
from vlcache_fx.spec.decoder import InputValueSpec


def input_value_specs(leaves: Sequence[Leaf], index: Mapping[Node, int]) -> tuple[InputValueSpec, ...]:
    """Return the specs of leaves, given the index of each input."""
    kinds = list(dict.fromkeys(leaf.kind for leaf in leaves))
    return tuple(
        InputValueSpec(
            index.get(leaf.node),
            leaf.token_dim,
            leaf.batch_dim,
            leaf.is_index,
            leaf.is_beside,
            kinds.index(leaf.kind),
        )
        for leaf in leaves
    )


def computed_leaves(leaves: Sequence[Leaf]) -> list[Node]:
    """Return the nodes of leaves that are not inputs."""
    return [leaf.node for leaf in leaves if leaf.node.op != "placeholder"]
