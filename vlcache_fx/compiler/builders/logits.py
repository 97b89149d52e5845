"""Which result holds logits: shadow runs compare it."""

import torch

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured
from vlcache_fx.ir.dataflow import carries_data, descendants
from vlcache_fx.ir.refusal import refuse


def find_logits(captured: Captured, facts: DecoderFacts) -> int:
    """The index of the result that holds logits.

    They are made of what leaves the last layer, and are not as wide as that. Of several such results, the
    widest.

    Raises:
        UnsupportedGraphError: NO_LOGITS, where results are hidden states, which say nothing of likelihoods.
    """
    last = facts.stream.boundaries[-1]
    width, behind = str(shape_of(last)[-1]), descendants([last])
    output = captured.graph_module.graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple | list)
    widths = {}
    for index, node in enumerate(results[: captured.num_results]):
        if not isinstance(node, torch.fx.Node) or node not in behind or not carries_data(node):
            continue
        value = node.meta["val"]
        if value.dim() >= 2 and value.is_floating_point() and str(value.shape[-1]) != width:
            widths[index] = int(value.shape[-1])
    if not widths:
        raise refuse(
            Reason.NO_LOGITS, last, f"no result behind the last layer has another width than its {width}"
        )
    return max(widths, key=lambda index: widths[index])
