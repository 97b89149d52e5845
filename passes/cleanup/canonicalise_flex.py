"""Replace flex attention by an attention call with a mask."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.attention.flex import FLEX, FlexAttention, Function, flex_attention
from vlcache_fx.analysis.attention.scores import NonCanonicalAttentionError, Term
from vlcache_fx.analysis.attention.sites import ATTEND, SDPA
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.utility.attention import gqa_needs_math_kernel, views_to_reshapes
from vlcache_fx.passes.utility.insert import (
    fake_mode,
    insert_call,
    insert_graph,
    insert_size,
    suppress_guards,
)
from vlcache_fx.passes.utility.masks import Masks

aten = torch.ops.aten


class CanonicaliseFlex(Pass):
    """Evaluates ``mask_mod`` for all queries and keys as a mask, and ``score_mod`` as a cap and biases.

    Both are functions of one score; ``torch.vmap`` vectorises them. A mask is
    [1 or batch, 1 or heads, rows, tokens]: the dimension of an unused index stays 1.
    """

    name: ClassVar[str] = "canonicalise_flex"

    def run(self, program: Program) -> bool:
        """Replace every call.

        Raises:
            UnsupportedGraphError: ATTENTION_FORM, with the call and the cause, where no such mask exists.
        """
        rewriter = _Rewriter(program)
        calls = list(program.graph.find_nodes(op="call_function", target=FLEX))
        for node in calls:
            try:
                found = flex_attention(node)
            except NonCanonicalAttentionError as error:
                raise refuse(Reason.ATTENTION_FORM, node, f"flex attention: {error}") from error
            rewriter.replace(found)
        return bool(calls)


class _Rewriter:
    """Replaces calls; functions with equal code are evaluated once, so layers share masks."""

    def __init__(self, program: Program) -> None:
        self._program, self._masks = program, Masks(program)
        self._evaluated: dict[Any, list[Node]] = {}

    def replace(self, found: FlexAttention) -> None:
        graph, node = self._program.graph, found.node
        with graph.inserting_before(node):
            is_causal = found.is_causal and not found.terms
            mask = None if is_causal else self._mask(found)
            gqa = shape_of(found.query)[1] != shape_of(found.key)[1]
            key, value = found.key, found.value
            target = SDPA if found.softcap is None else ATTEND
            if gqa and gqa_needs_math_kernel(target, value.meta["val"], mask):
                groups = shape_of(found.query)[1] // shape_of(key)[1]
                key, value = (self._repeated(operand, groups, node) for operand in (key, value))
                gqa = False
            given: tuple[Any, ...] = (found.query, key, value, mask)
            if target is SDPA:
                named = {"scale": found.scale, "enable_gqa": gqa}
                causal = (0.0, True) if is_causal else ()
                result = insert_call(graph, SDPA, *given, *causal, origin=node, **named)
            else:
                wide = [self._in_float32(operand, node) for operand in given[:2]]  # as in flex attention
                rest = (None, is_causal, found.scale, found.softcap, gqa)
                result = insert_call(graph, ATTEND, *wide, *given[2:], *rest, origin=node)
        for taken in found.results:
            taken.replace_all_uses_with(result)
        for user in [*node.users, node]:
            graph.erase_node(user)
        views_to_reshapes(result)

    def _repeated(self, node: Node, groups: int, origin: Node) -> Node:
        batch, heads, _, dim = shape_of(node)
        for target, argument in (
            (aten.unsqueeze.default, 2),
            (aten.expand.default, [-1, -1, groups, -1, -1]),
            (aten.reshape.default, [batch, heads * groups, -1, dim]),
        ):
            node = insert_call(self._program.graph, target, node, argument, origin=origin)
        return node

    def _in_float32(self, node: Node, origin: Node) -> Node:
        if node.meta["val"].dtype not in (torch.float16, torch.bfloat16):
            return node
        return insert_call(
            self._program.graph, aten._to_copy.default, node, dtype=torch.float32, origin=origin
        )

    def _mask(self, found: FlexAttention) -> Node | None:
        terms: list[Term] = []
        if found.terms:
            values = self._evaluate(found, found.score, [term.node for term in found.terms], has_score=True)
            terms += [replace(term, node=value) for term, value in zip(found.terms, values, strict=True)]
        if found.mask is not None:
            (visible,) = self._evaluate(found, found.mask, [found.mask.result], has_score=False)
            terms.append(Term("visible", visible, -torch.inf))
        return self._masks.joined(terms, found.query.meta["val"].dtype, 4, found.node)

    def _evaluate(
        self, found: FlexAttention, function: Function, results: Sequence[Node], *, has_score: bool
    ) -> list[Node]:
        """Return ``results`` of ``function`` for all samples, heads, queries and keys."""
        module = extract(function.module, results)
        inputs = list(module.graph.find_nodes(op="placeholder"))
        indices, sizes = inputs[has_score : has_score + 4], shape_of(found.query)
        counts = [
            sizes[0] if indices[0].users else 1,
            sizes[1] if indices[1].users else 1,
            sizes[2],
            shape_of(found.key)[2],
        ]
        key = (str(module.graph), function.reads, tuple(map(str, counts)), has_score)
        if any(node.op == "get_attr" for node in module.graph.nodes) or key not in self._evaluated:
            self._evaluated[key] = self._insert(found, module, function.reads, counts, has_score)
        return self._evaluated[key]

    def _insert(
        self,
        found: FlexAttention,
        module: GraphModule,
        reads: tuple[Any, ...],
        counts: Sequence[Any],
        has_score: bool,
    ) -> list[Node]:
        graph, origin = self._program.graph, found.node
        device = found.query.meta["val"].device
        sizes = [insert_size(graph, count, origin) for count in counts]
        indices = [
            insert_call(graph, aten.arange.default, size, device=device, origin=origin) for size in sizes
        ]
        given = [*indices, *reads]
        values = [value.meta["val"] if isinstance(value, Node) else value for value in given]
        traced = _trace(_vectorised(module, len(reads), has_score), values)
        return insert_graph(self._program, traced, given, origin)


def _vectorised(module: GraphModule, num_reads: int, has_score: bool) -> Callable[..., Any]:
    """Vectorise a function of four indices: its results are [samples, heads, queries, keys]."""

    def scalar(*arguments: Any) -> Any:
        score = [torch.zeros((), device=arguments[0].device)] if has_score else []
        return module(*score, *arguments)

    function: Callable[..., Any] = scalar
    for dim in (3, 2, 1, 0):
        over = tuple(0 if index == dim else None for index in range(4))
        function = torch.vmap(function, in_dims=(*over, *[None] * num_reads))
    return function


def _trace(function: Callable[..., Any], values: Sequence[Any]) -> GraphModule:
    mode = fake_mode(values)
    with torch.no_grad(), mode, suppress_guards(mode.shape_env):
        traced = make_fx(function)(*values)
    assert isinstance(traced, GraphModule)
    return traced
