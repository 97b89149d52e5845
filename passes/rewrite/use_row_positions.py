"""Pass the positions of rows to attention on CPUs instead of a mask."""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from vlcache_fx.ops import decompose_attention, row_mask
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
FIELDS = ("attn_mask", "dropout_p", "is_causal")
BOTH = aten.__and__.Tensor


class UseRowPositions(Pass):
    """Attention with the mask ``(arange(tokens) <= positions) & rest`` becomes a call of ``attend_up_to``.

    ``restrict_rows`` replaces ``is_causal`` by such a mask, [rows, tokens]. On CPUs, computing it in every
    layer takes longer than the attention; the kernel for CPUs compares positions instead. ``rest`` is any
    other condition, such as the padding mask.

    The Inductor lowering runs this pass on each segment and traces the result again, because
    ``attend_up_to`` is not an operator. Programs for ``eager`` and for export keep their masks.
    """

    name: ClassVar[str] = "use_row_positions"

    def run(self, program: Program) -> bool:
        """Replace every such call, and drop unused masks."""
        calls = program.graph.find_nodes(op="call_function", target=SDPA)
        replaced = [node for node in calls if _replace(program.graph, node)]
        if replaced:
            program.graph.eliminate_dead_code()
        return bool(replaced)


def _replace(graph: Graph, node: Node) -> bool:
    given = {**dict(zip(FIELDS, node.args[3:], strict=False)), **node.kwargs}
    conditions = _conditions(given.pop("attn_mask", None))
    compared = next((pair for pair in map(_compared, conditions) if pair is not None), None)
    if compared is None or given.pop("is_causal", False) or given.pop("dropout_p", 0.0):
        return False
    others = [
        condition
        for condition in conditions
        if _compared(condition) != compared and not _is_all_true(condition)
    ]
    with graph.inserting_before(node):
        rest = functools.reduce(lambda a, b: graph.call_function(BOTH, (a, b)), others) if others else None
        call = graph.call_function(attend_up_to, (*node.args[:3], *compared, rest), given)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return True


def _conditions(mask: Any) -> list[Node]:
    """Return the conditions whose conjunction is the mask; they broadcast from the last dim."""
    if not isinstance(mask, Node):
        return []
    if mask.target is BOTH:
        return [condition for part in mask.args for condition in _conditions(part)]
    return _conditions(mask.args[0]) if mask.target is aten.expand.default else [mask]


def _is_all_true(mask: Node) -> bool:
    """Return True for a scalar that is True."""
    return mask.target is aten.new_ones.default and mask.args[1] == []


def _compared(mask: Node) -> tuple[Any, Any] | None:
    """Return the positions and the number of tokens of ``arange(tokens) <= positions``, else None."""
    if mask.target is not aten.le.Tensor:
        return None
    tokens, positions = mask.args
    counted = _arange(tokens)
    return None if counted is None else (positions, counted[0])


def _arange(tokens: Any) -> tuple[Any, int] | None:
    """Return the end and the rank of an ``arange`` from 0 along the last dim (other dims 1), else None."""
    if not isinstance(tokens, Node):
        return None
    if tokens.target is aten.arange.default:
        device: Any = tokens.kwargs.get("device") or "cpu"
        is_counted = tokens.kwargs.get("dtype") in (None, torch.int64)
        return (tokens.args[0], 1) if is_counted and torch.device(device).type == "cpu" else None
    found = _arange(tokens.args[0]) if tokens.args else None
    if found is None:
        return None
    end, rank = found
    if tokens.target is aten.add.Tensor and tokens.args[1:] == (0,) and not tokens.kwargs:
        return found
    if tokens.target is aten.unsqueeze.default:
        dim: Any = tokens.args[1]
        return (end, rank + 1) if dim % (rank + 1) < rank else None
    return None


def attend_up_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    tokens: int,
    rest: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attention under the mask ``(arange(tokens) <= positions) & rest``.

    Args:
        query: [batch, heads, rows, dim].
        key, value: [batch, key heads, tokens, dim].
        positions: positions of the rows, [rows, 1] or [batch, 1, rows, 1]; other shapes use a mask.
        tokens: width of the mask: the number of keys, or 1.
        rest: bool, broadcastable to [batch, heads, rows, tokens], such as a padding mask; or None.
        **options: ``scale`` and ``enable_gqa``, as in ``scaled_dot_product_attention``.
    """
    if statically_known_true(tokens == key.shape[-2]):
        result = decompose_attention(query, key, value, rest, places=positions, **options)
        if isinstance(result, Tensor):
            return result
    mask = row_mask(positions, tokens)
    mask = mask if rest is None else mask & rest
    return F.scaled_dot_product_attention(query, key, value, mask, **options)
