"""Finds the logits among the results, for shadow runs."""

import torch

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured
from vlcache_fx.ir.dataflow import carries_data, descendants
from vlcache_fx.ir.refusal import refuse


def find_logits(captured: Captured, facts: DecoderFacts) -> int:
    """Return the index of the result that has the logits.

    Logits depend on the output of the last layer and have another width. Of several such results, the widest
    is chosen.

    Raises:
        UnsupportedGraphError: NO_LOGITS, where all results are hidden states.
    """
    last = facts.stream.boundaries[-1]
    width, dependents = str(shape_of(last)[-1]), descendants([last])
    output = captured.graph_module.graph.output_node()
    results = output.args[0]
    assert isinstance(results, tuple | list)
    widths = {}
    for index, node in enumerate(results[: captured.num_results]):
        if not isinstance(node, torch.fx.Node) or node not in dependents or not carries_data(node):
            continue
        value = node.meta["val"]
        if value.dim() >= 2 and value.is_floating_point() and str(value.shape[-1]) != width:
            widths[index] = int(value.shape[-1])
    if not widths:
        raise refuse(Reason.NO_LOGITS, last, f"no result after the last layer has a width other than {width}")
    return max(widths, key=lambda index: widths[index])
