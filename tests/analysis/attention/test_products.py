"""Matrix products of all operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.analysis.attention.products import Operand, Product, product_of

LEFT, RIGHT = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)

FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, y: x @ y.mT,
    "bmm": lambda x, y: torch.bmm(x[0], y[0].mT),
    "baddbmm": lambda x, y: torch.baddbmm(x[0, :, :, :1], x[0], y[0].mT, beta=0.5, alpha=3),
    "einsum": lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
    "einsum, heads last": lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x.transpose(1, 2), y.transpose(1, 2)),
    "einsum, other order": lambda x, y: torch.einsum("bhkd,bhqd->bhqk", y, x),
    "einsum, group": lambda x, y: torch.einsum("bhqd,bkd->bhqk", x, y[:, 0]),
    "einsum, result turned": lambda x, y: torch.einsum("bhqd,bhdk->bqhk", x, y.mT),
    "einsum of values": lambda x, y: torch.einsum("bhqd,bdhk->bqhk", x, y.permute(0, 3, 1, 2)),
}


def nodes_of(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[torch.fx.GraphModule, list[Product]]:
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(LEFT, RIGHT)
    found = [product_of(node) for node in module.graph.nodes]
    return module, [one for one in found if one is not None]


def value_of(operand: Operand, values: dict[Node, Tensor]) -> Tensor:
    value = values[operand.node]
    for target, arguments in operand.steps:
        value = target(value, *arguments)
    assert tuple(value.shape) == tuple(operand.shape)
    return value


class Values(Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> object:
        self.values[n] = super().run_node(n)
        return self.values[n]


@pytest.mark.parametrize("name", FORMS)
def test_product_of_operands(name: str) -> None:
    module, (product,) = nodes_of(FORMS[name])
    run = Values(module)
    run.run(LEFT, RIGHT)
    got = value_of(product.left, run.values) @ value_of(product.right, run.values) * product.factor
    if product.added is not None:
        got = got + run.values[product.added[0]] * product.added[1]
    if product.order is not None:
        got = got.permute(product.order)
    torch.testing.assert_close(got, run.values[product.node])
    assert torch.equal(
        value_of(product.right.transposed(), run.values), value_of(product.right, run.values).mT
    )


def test_transposed_undoes_transpose() -> None:
    _, (product,) = nodes_of(FORMS["matmul"])
    key = product.right.transposed()
    assert (key.node.op, key.steps) == ("placeholder", ())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ y[0, 0].mT,  # usually weights
        lambda x, y: x * y[:, :, :1],
        lambda x, y: torch.einsum("bhqd,bhkd->bhq", x, y),
        lambda x, y: torch.einsum("bhqd,bhqd->bhqd", x, y[:, :, :5]),
        lambda x, y: torch.einsum("...qd,...kd->...qk", x, y),
        lambda x, y: torch.einsum("bhqd->bhdq", x),
    ],
)
def test_product_of_other_nodes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert nodes_of(function)[1] == []
