"""The values of a request that keys hold beside spans and masks, as analysis found them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from vlcache_fx.analysis.decoder.computation import Leaf
from vlcache_fx.spec.decoder import InputValueSpec


def leaf_specs(leaves: Sequence[Leaf], index: Mapping[Node, int]) -> tuple[InputValueSpec, ...]:
    """Plain data of leaves, in a graph with inputs of this ``index``."""
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


def made_leaves(leaves: Sequence[Leaf]) -> list[Node]:
    """Those that are no inputs."""
    return [leaf.node for leaf in leaves if leaf.node.op != "placeholder"]
