"""The token axis through each operator, and refused operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from vlcache_fx.analysis import TokenFlow, analyze
from vlcache_fx.analysis.tokens.axis import TokenAxis
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import Reason, UnsupportedGraphError

from ..graphs import attend, capture

aten = torch.ops.aten
TOKENS = 6
ROWS = torch.tensor([1, 4, 5])
X = torch.randn(1, TOKENS, 4, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(2))
MASK = X[..., 0] > 0
ROUTER = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
INTEGERS = torch.arange(32, dtype=torch.int8).view(4, 8)
EXPERTS = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(4))

Function = Callable[[Tensor], Any]


def traced(function: Function) -> torch.fx.GraphModule:
    with torch.no_grad():
        module = make_fx(function, pre_dispatch=True)(X)
        assert isinstance(module, torch.fx.GraphModule)
        Noted(module).run(X)
    return module


class Noted(torch.fx.Interpreter):
    """Keeps every value as ``meta["val"]``, those of constants included."""

    def run_node(self, n: torch.fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def flows_of(function: Function) -> tuple[torch.fx.GraphModule, dict[torch.fx.Node, TokenFlow]]:
    """The token flow of every node computed from the input, whose axis is 1."""
    module = traced(function)
    first = next(node for node in module.graph.nodes if node.op == "placeholder")
    axes, flows = {first: TokenAxis(1)}, {}
    for node in module.graph.nodes:
        if node.op == "call_function" and any(parent in axes for parent in node.all_input_nodes):
            flows[node] = follow_tokens(node, axes)
            axes[node] = flows[node].axis
    return module, flows


class Restricted(torch.fx.Interpreter):
    """Runs a graph on ``ROWS`` only, applying the token flow of each node."""

    def __init__(self, module: torch.fx.GraphModule, flows: dict[torch.fx.Node, TokenFlow]) -> None:
        super().__init__(module)
        self.flows = flows

    def run_node(self, n: torch.fx.Node) -> Any:
        flow = self.flows.get(n)
        if flow is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        for operand, dim in flow.gathers:
            cut = self.env[operand].index_select(dim, ROWS)
            args = torch.fx.node.map_aggregate(args, lambda a, o=operand, c=cut: c if a is self.env[o] else a)
        if flow.size_argument is not None:
            argument, entry = flow.size_argument
            sizes = list(args[argument])
            if sizes[entry] != -1:
                entries = flow.axis.entries
                sizes[entry] = entries.outer * len(ROWS) * entries.inner
            args = (*args[:argument], sizes, *args[argument + 1 :])
        return n.target(*args, **kwargs)  # type: ignore[operator]


def entries_of(axis: TokenAxis) -> Tensor:
    """The indices of ``ROWS`` along the axis."""
    outer, inner = axis.entries.outer, axis.entries.inner
    return torch.arange(outer * TOKENS * inner).view(outer, TOKENS, inner)[:, ROWS].flatten()


def routed(x: Tensor) -> Tensor:
    """A mixture of experts by sorting: two of three experts per token."""
    rows = x.view(-1, 4)
    scores, chosen = (rows @ ROUTER).softmax(-1).topk(2, -1)
    keys, order = chosen.reshape(-1).sort()
    ends = torch.histc(keys.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
    sent = torch._grouped_mm(rows[order // 2], EXPERTS, offs=ends) * scores.reshape(-1)[order, None]
    return sent[order.argsort()].view(TOKENS, 2, 4).sum(1).view(1, TOKENS, 4)


def routed_elsewhere(x: Tensor) -> Tensor:
    """Groups of other scores."""
    rows = x.view(-1, 4)
    order = rows[:, 0].argsort()
    keys = rows[:, 1].long().sort()[0]
    ends = torch.histc(keys.float(), 3, 0, 2).cumsum(0, dtype=torch.int32)
    return torch._grouped_mm(rows[order], EXPERTS, offs=ends)


TOKENWISE: dict[str, Function] = {
    "pointwise": lambda x: (x * 2).exp() + x,
    "pointwise_with_a_table": lambda x: x * TABLE + TABLE[None],
    "pointwise_with_a_column": lambda x: x + TABLE[:, :1],
    "pointwise_with_a_vector": lambda x: x + TABLE[0],
    "linear": lambda x: F.linear(x, WEIGHT),
    "matmul": lambda x: x @ WEIGHT.t(),
    "mm": lambda x: aten.mm(x.view(TOKENS, 4), WEIGHT.t()),
    "addmm": lambda x: aten.addmm(torch.ones(8), x.view(TOKENS, 4), WEIGHT.t()),
    "addmm_with_a_row_per_token": lambda x: aten.addmm(TABLE, x.view(TOKENS, 4), torch.ones(4, 4)),
    "integer_mm": lambda x: aten._int_mm((x.view(TOKENS, 4) * 9).to(torch.int8), INTEGERS),
    "view": lambda x: x.view(1, TOKENS, 2, 2),
    "reshape": lambda x: aten.reshape(x, [TOKENS, -1]),
    "view_with_open_tokens": lambda x: x.view(1, -1, 2, 2),
    "expand": lambda x: x[:, None].expand(2, 3, TOKENS, 4),
    "transpose": lambda x: x.view(1, TOKENS, 2, 2).transpose(1, 2),
    "transpose_of_others": lambda x: x.view(1, TOKENS, 2, 2).transpose(2, 3),
    "t": lambda x: x.view(TOKENS, 4).t(),
    "permute": lambda x: x.permute(2, 0, 1),
    "unsqueeze_before": lambda x: x.unsqueeze(0),
    "unsqueeze_after": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2).squeeze(0),
    "squeeze_dims": lambda x: aten.squeeze.dims(x.unsqueeze(2), [0, 2]),
    "slice_of_a_head": lambda x: x[..., :2] + x[..., 2:],
    "slice_of_everything": lambda x: aten.slice(x, 1, 0, 2**63 - 1),
    "split": lambda x: x.split(2, -1)[1],
    "split_with_sizes": lambda x: x.split([1, 3], -1)[1],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "select": lambda x: x[0],
    "select_after": lambda x: x[..., 1],
    "index_select": lambda x: x.index_select(2, torch.tensor([3, 0])),
    "masked_after": lambda x: x[..., torch.tensor([True, False, True, True])],
    "masked_before": lambda x: x.view(1, TOKENS, 2, 2).permute(2, 3, 0, 1)[torch.eye(2).bool()],
    "index_copy": lambda x: x.index_copy(2, torch.tensor([3, 0]), x[..., :2] + 1),
    "index_copy_of_a_table": lambda x: x.index_copy(0, torch.tensor([0]), TABLE[None]),
    "cat": lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1),
    "cat_with_a_table": lambda x: torch.cat([x, TABLE[None]], -1),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(2),
    "amax_before": lambda x: x.amax(0),
    "var": lambda x: x.var(-1, keepdim=True),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(2),
    "cumsum": lambda x: x.cumsum(-1),
    "layer_norm": lambda x: F.layer_norm(x, [4]),
    "rms_norm": lambda x: F.rms_norm(x, [4]),
    "clone": lambda x: x.clone().contiguous(),
    "to": lambda x: x.to(torch.float64).to(torch.float32),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "gelu": F.gelu,
    "where": lambda x: torch.where(x > 0, x, TABLE),
    "stack": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "stack_with_a_table": lambda x: torch.stack([x[0], TABLE], 0),
    "unbind": lambda x: x.unbind(2)[1],
    "type_as": lambda x: x.double().type_as(TABLE),
    "view_merging": lambda x: x.view(1, -1) * 2,
    "view_there_and_back": lambda x: (x.view(-1) + 1).view(1, TOKENS, 2, 2),
    "view_into_a_given_size": lambda x: x.view(1, TOKENS * 4).view(TOKENS, 4),
    "repeat_outside": lambda x: x[0].repeat(3, 1).view(3, TOKENS, 4).sum(0),
    "merged_with_samples": lambda x: x.expand(2, TOKENS, 4).reshape(-1, 4).exp(),
    "convolution_of_each_token": lambda x: F.conv1d(x[0][:, None], torch.ones(2, 1, 3)),
    "topk": lambda x: x.topk(2, -1)[0],
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "scatter": lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1)[1], 1.0),
    "batched_matrices_per_token": lambda x: torch.bmm(x[0][:, None], (x[0][:, :, None] * TABLE[:1])),
    "experts_outside": lambda x: torch.bmm(x.expand(3, TOKENS, 4), EXPERTS),
    "expert_of_each_token": lambda x: torch.bmm(x[0][:, None], EXPERTS[x[0, :, :3].argmax(-1)]),
    "routed": routed,
    "embedding": lambda x: F.embedding(x[..., 0].clamp(0, 2).long(), TABLE),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(1, TOKENS, 2, 2)) * 1j).flatten(2),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_follow_tokens_restricted_rows(name: str) -> None:
    function = TOKENWISE[name]
    module, flows = flows_of(function)
    last = [node for node in module.graph.nodes if node in flows][-1]
    want = function(X).index_select(flows[last].dim, entries_of(flows[last].axis))
    got = Restricted(module, flows).run(X.index_select(1, ROWS))
    torch.testing.assert_close(got, want)


REFUSED: dict[str, tuple[Function, Reason, str]] = {
    "flip": (lambda x: x.flip(1), Reason.UNKNOWN_OP, "aten.flip.default is not known to work token by token"),
    "roll": (lambda x: x.roll(1, 1), Reason.UNKNOWN_OP, "aten.roll.default"),
    "convolution": (
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(4, 4, 3), padding=1),
        Reason.TOKEN_AXIS_LOST,
        "convolves over tokens",
    ),
    "sort": (lambda x: x.sort(1)[0], Reason.TOKEN_AXIS_LOST, "it sorts a tensor of several dimensions"),
    "cumsum": (lambda x: x.cumsum(1), Reason.TOKEN_AXIS_LOST, "runs along the token axis"),
    "softmax": (lambda x: x.softmax(1), Reason.TOKEN_AXIS_LOST, "runs along the token axis"),
    "mean": (lambda x: x.mean(1), Reason.TOKEN_AXIS_LOST, "reduces over the token axis"),
    "sum_of_all": (aten.sum.default, Reason.TOKEN_AXIS_LOST, "reduces over every dimension"),
    "norm": (
        lambda x: F.layer_norm(x, [TOKENS, 4]),
        Reason.TOKEN_AXIS_LOST,
        "normalises over the token axis",
    ),
    "linear": (
        lambda x: F.linear(x.transpose(1, 2), torch.ones(2, TOKENS)),
        Reason.TOKEN_AXIS_LOST,
        "multiplies along",
    ),
    "matmul": (
        lambda x: x.transpose(1, 2) @ TABLE,
        Reason.TOKEN_AXIS_LOST,
        "multiplies along the token axis",
    ),
    "matmul_of_itself": (
        lambda x: x @ x.transpose(1, 2),
        Reason.TOKEN_AXIS_LOST,
        "has a second token axis",
    ),
    "matmul_per_token": (
        lambda x: x[0, :, None] @ torch.ones(TOKENS, 4, 4),
        Reason.TOKEN_AXIS_LOST,
        "may differ from token to token",
    ),
    "addmm": (
        lambda x: aten.addmm(torch.ones(4), torch.ones(4, TOKENS), x[0]),
        Reason.TOKEN_AXIS_LOST,
        "first factor",
    ),
    "integer_mm": (
        lambda x: aten._int_mm(torch.ones(8, TOKENS, dtype=torch.int8), x[0].to(torch.int8)),
        Reason.TOKEN_AXIS_LOST,
        "first factor",
    ),
    "view_and_a_table": (
        lambda x: x.view(-1) + TABLE.view(-1),
        Reason.TOKEN_AXIS_LOST,
        "has other entries along the token axis",
    ),
    "other_tokens": (
        lambda x: x[0][x[0, :, 0].long()],
        Reason.TOKEN_AXIS_LOST,
        "indexes other tokens",
    ),
    "sorted_and_not_sorted_back": (
        lambda x: x[0] + x[0][x[0, :, 0].argsort()],
        Reason.TOKEN_AXIS_LOST,
        "token axes of its operands do not match",
    ),
    "groups_of_others": (routed_elsewhere, Reason.TOKEN_AXIS_LOST, "do not match the order of its rows"),
    "count": (
        lambda x: torch.histc(x[0, :, 0], 3, 0, 2),
        Reason.TOKEN_AXIS_LOST,
        "it counts tokens",
    ),
    "topk_of_tokens": (lambda x: x.topk(2, 1)[0], Reason.TOKEN_AXIS_LOST, "it compares tokens"),
    "gather_from_tokens": (
        lambda x: x.gather(1, x.long().clamp(0, 1)),
        Reason.TOKEN_AXIS_LOST,
        "reads values of other tokens",
    ),
    "stack_crossed": (
        lambda x: torch.stack([x.view(TOKENS, 4), x.view(TOKENS, 4).repeat(1, 1).t().reshape(TOKENS, 4)]),
        Reason.TOKEN_AXIS_LOST,
        "merges the token axis",
    ),
    "unbind": (lambda x: x.unbind(1)[0], Reason.TOKEN_AXIS_LOST, "it unbinds the token axis"),
    "view_in_pairs": (lambda x: x.view(1, 3, 8), Reason.TOKEN_AXIS_LOST, "merges the token axis"),
    "squeeze_any": (aten.squeeze.default, Reason.TOKEN_AXIS_LOST, "may drop any dimension"),
    "squeeze": (lambda x: aten.squeeze.dim(x, 1), Reason.TOKEN_AXIS_LOST, "drops the token axis"),
    "slice": (lambda x: x[:, 1:], Reason.TOKEN_AXIS_LOST, "selects some tokens"),
    "select": (lambda x: x[:, 1], Reason.TOKEN_AXIS_LOST, "selects a single token"),
    "index_select": (lambda x: x.index_select(1, ROWS), Reason.TOKEN_AXIS_LOST, "selects some tokens"),
    "split": (lambda x: x.split(2, 1)[0], Reason.TOKEN_AXIS_LOST, "splits the token axis"),
    "chunk": (lambda x: x.chunk(2, 1)[0], Reason.TOKEN_AXIS_LOST, "splits the token axis"),
    "index_copy": (
        lambda x: x.index_copy(1, torch.arange(TOKENS), x + 1),
        Reason.TOKEN_AXIS_LOST,
        "writes to places along the token axis",
    ),
    "index_copy_by_tokens": (
        lambda x: x.permute(2, 0, 1).index_copy(0, x[0, :4, 0].argsort(), x.permute(2, 0, 1)),
        Reason.TOKEN_AXIS_LOST,
        "it selects some tokens",
    ),
    "cat": (lambda x: torch.cat([x, x], 1), Reason.TOKEN_AXIS_LOST, "joins tensors along the token axis"),
    "masked": (lambda x: x[x[..., 0] > 0], Reason.DATA_DEPENDENT, "how many tokens it selects"),
    "masked_by_others": (lambda x: x[MASK], Reason.DATA_DEPENDENT, "how many tokens it selects"),
    "masked_alone": (lambda x: x[:, MASK[0]], Reason.DATA_DEPENDENT, "how many tokens it selects"),
    "masked_table": (lambda x: TABLE[x[0, :, 0] > 0], Reason.DATA_DEPENDENT, "how many tokens it selects"),
    "crossed": (
        lambda x: x[..., :1] + x[..., 0],
        Reason.TOKEN_AXIS_LOST,
        "token axes of its operands do not match",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_follow_tokens_refuses_mixing(name: str) -> None:
    function, reason, detail = REFUSED[name]
    with pytest.raises(UnsupportedGraphError, match=detail) as refusal:
        flows_of(function)
    assert refusal.value.reason is reason
    assert refusal.value.node in [node.name for node in traced(function).graph.nodes]


def mixing(x: Tensor) -> Tensor:
    x = x * 2
    x = x + attend(x)
    x = x + x.flip(1)  # mixes
    return x + attend(x)


def test_follow_tokens_refusal_names_line() -> None:
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(mixing, {"x": torch.randn(1, 6, 4)}))
    assert refusal.value.reason is Reason.UNKNOWN_OP
    assert refusal.value.node == "flip"
    assert refusal.value.source_line is not None
    assert "test_follow.py" in refusal.value.source_line
    assert refusal.value.source_line.endswith("in mixing: x = x + x.flip(1)  # mixes")


def test_follow_tokens_refuses_other_nodes() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(UnsupportedGraphError, match="a call_method node in the residual stream"):
        follow_tokens(graph.call_method("exp", (x,)), {x: TokenAxis(1)})
