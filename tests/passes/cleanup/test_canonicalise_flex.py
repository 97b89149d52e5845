"""``canonicalise_flex``: flex attention becomes an attention call with a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.capture import capture_dynamo
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.passes import Pipeline, Program
from vlcache_fx.passes.cleanup import CanonicaliseFlex, DropNoops
from vlcache_fx.passes.cleanup import canonicalise_flex as module
from vlcache_fx.testing.graphs import traced_graphs

from ...runtime.helpers import own_compiler_state
from ..programs import text, unchanged
from .graphs import program_of

pytestmark = [
    # The unmodified model runs flex attention uncompiled.
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning"),
    # Raised inside torch for masks that read a tensor.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*instantiated.*:DeprecationWarning"),
]

TOKENS, DIM = 20, 16
Mod = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


class Flex(nn.Module):
    """Flex attention of four heads to two, with functions that may read ``padding`` and ``bias``."""

    def __init__(self, mask_mod: Mod | None, score_mod: Mod | None = None, results: int = 1) -> None:
        super().__init__()
        self.mask_mod, self.score_mod, self.results = mask_mod, score_mod, results

    def forward(self, x: Tensor, padding: Tensor, bias: Tensor) -> Any:
        tokens = x.shape[1]
        x = x.view(1, tokens, 4, DIM).transpose(1, 2)
        mask_mod, score_mod = self.mask_mod, self.score_mod

        def masked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert mask_mod is not None
            return mask_mod(padding, b, h, q, k)

        def scored(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            assert score_mod is not None
            return score_mod(bias, score, b, h, q, k)

        blocks = None
        if mask_mod is not None:
            blocks = create_block_mask(masked, 1, None, tokens, tokens, device=x.device)
        given = {"block_mask": blocks, "scale": 0.3, "enable_gqa": True}
        score = scored if score_mod is not None else None
        result = flex_attention(x, x[:, :2] * 0.5, x[:, 2:], score, **given)
        return result.transpose(1, 2).reshape(1, tokens, 4 * DIM)


def causal(padding: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def causal_the_other_way(padding: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k + 0 <= q + 0


def padded(padding: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & padding[b, k]


def window_of_a_head(padding: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q - k < 3 + 2 * h)


def everything(padding: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return noop_mask(b, h, q, k)


def capped(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(score / 2.0) * 2.0


def biased(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A padding mask of four dims, as some models index it."""
    return score + bias[b][0][q][k]


def sloped(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * 0.5 + (k - q) * torch.exp2(-(h + 1.0))


def hidden_by_score(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where(q >= k, score, -float("inf"))


def call(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(1, TOKENS, dtype=torch.bool)
    padding[:, :3] = False
    bias = torch.randn(1, 1, TOKENS, TOKENS, generator=generator)
    x = torch.randn(1, TOKENS, 4 * DIM, generator=generator).to(dtype)
    return {"x": x, "padding": padding, "bias": bias}


def canonical(
    model: Flex, inputs: dict[str, Tensor], dynamic: bool | None = None
) -> tuple[Site, Tensor, Program]:
    captures = []
    graphs = traced_graphs(
        model, inputs, dynamic=dynamic, seen=lambda *given: captures.append(capture_dynamo(*given))
    )
    (captured,), (graph,) = captures, graphs
    program = Program(captured.graph_module)
    Pipeline((DropNoops(), CanonicaliseFlex())).run(program)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    (site,) = find_sites(program.graph)
    with torch.no_grad():
        return site, program.graph_module(*graph.calls[0])[0], program


def test_graph(golden: Callable[[str, str], None]) -> None:
    captures = []
    traced_graphs(Flex(padded, capped), call(), seen=lambda *given: captures.append(capture_dynamo(*given)))
    program = Program(captures[0].graph_module)
    assert CanonicaliseFlex().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    golden(
        "canonicalise_flex", text(program.graph)
    )  # kernel options in the graph before depend on torch's version


@pytest.mark.parametrize(
    ("mask_mod", "score_mod", "dynamic"),
    [
        *[(mask, None, None) for mask in (None, causal_the_other_way, window_of_a_head, everything)],
        *[(None, score, None) for score in (capped, biased)],
        # Each part is in a case above, and the first three are below with symbolic sizes.
        *[
            pytest.param(*mods, None, marks=pytest.mark.thorough)
            for mods in ((causal, None), (padded, capped), (None, sloped), (padded, biased), (padded, sloped))
        ],
        (causal, capped, None),
        (None, hidden_by_score, None),
        (causal, None, True),
        (padded, capped, True),
        (window_of_a_head, biased, True),
        (None, sloped, True),
    ],
)
def test_numbers(mask_mod: Mod | None, score_mod: Mod | None, dynamic: bool | None) -> None:
    model, inputs = Flex(mask_mod, score_mod), call()
    site, got, _ = canonical(model, inputs, dynamic)
    with torch.no_grad():
        want = model(**inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert site.enable_gqa
    assert site.softcap == (2.0 if score_mod is capped else None)
    assert site.scale == pytest.approx(0.15 if score_mod is sloped else 0.3)
    plain = score_mod in (None, capped)
    assert site.is_causal == (plain and mask_mod in (causal, causal_the_other_way))
    assert (site.mask is None) == (plain and mask_mod not in (padded, window_of_a_head))


@pytest.mark.parametrize("score_mod", [None, capped])
def test_numbers_in_bfloat16(score_mod: Mod | None) -> None:
    """Flex attention computes scores in float32."""
    model, inputs = Flex(padded, score_mod), call(torch.bfloat16)
    _, got, _ = canonical(model, inputs)
    with torch.no_grad():
        want = model(**inputs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_repeats_heads_where_gqa_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gqa_needs_math_kernel", lambda *given: True)
    model, inputs = Flex(padded), call()
    site, got, _ = canonical(model, inputs, dynamic=True)
    assert not site.enable_gqa
    assert site.key.meta["val"].shape[1] == 4
    with torch.no_grad():
        torch.testing.assert_close(got, model(**inputs), atol=1e-5, rtol=1e-5)


def test_mask_shapes_are_minimal() -> None:
    site, _, _ = canonical(Flex(padded), call())
    assert site.mask is not None
    assert (site.mask.meta["val"].dtype, site.mask.meta["val"].shape) == (torch.bool, (1, 1, TOKENS, TOKENS))
    site, _, _ = canonical(Flex(window_of_a_head), call())
    assert site.mask is not None
    assert site.mask.meta["val"].shape == (1, 4, TOKENS, TOKENS)


@pytest.mark.parametrize("dynamic", [None, True])
def test_calls_share_equal_masks(dynamic: bool | None) -> None:
    class Twice(Flex):
        def forward(self, x: Tensor, padding: Tensor, bias: Tensor) -> Any:
            return super().forward(super().forward(x, padding, bias), padding, bias)

    captures = []
    traced_graphs(
        Twice(padded), call(), dynamic=dynamic, seen=lambda *given: captures.append(capture_dynamo(*given))
    )
    program = Program(captures[0].graph_module)
    CanonicaliseFlex().run(program)
    first, second = find_sites(program.graph)
    assert first.mask is second.mask
    assert str(program.graph).count("aten.index.Tensor") == 1


def test_inserted_nodes_have_metadata() -> None:
    _, _, program = canonical(Flex(padded, capped), call(), dynamic=True)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node
            assert "forward" in (node.meta.get("stack_trace") or ""), node


# Refusals ---------------------------------------------------------------------------------------------------


def squared(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * score


def constant(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return bias[b, 0, q, k]


def rectified(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score.relu()


def scaled_by_head(bias: Tensor, score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score * (h + 1)


@pytest.mark.parametrize(
    ("score_mod", "why"),
    [
        (squared, "scaled by a tensor"),
        (constant, "does not keep the score"),
        (rectified, "does not keep the score"),
        (scaled_by_head, "scaled by a tensor"),
    ],
)
def test_refuses_other_score_functions(score_mod: Mod, why: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=why) as refusal:
        canonical(Flex(causal, score_mod), call())
    assert refusal.value.reason is Reason.ATTENTION_FORM
    assert refusal.value.node is not None
    assert refusal.value.node.startswith("flex_attention")
    assert refusal.value.source_line is not None
    assert "flex_attention.py" in refusal.value.source_line


def test_refuses_read_logsumexp() -> None:
    from torch.nn.attention.flex_attention import AuxRequest

    class WithSums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = x.view(1, TOKENS, 4, DIM).transpose(1, 2)
            result, sums = flex_attention(x, x, x, return_aux=AuxRequest(lse=True))
            return result, sums.lse

    captures: list[Any] = []
    traced_graphs(WithSums(), {"x": call()["x"]}, seen=lambda *given: captures.append(capture_dynamo(*given)))
    with pytest.raises(UnsupportedGraphError, match="log-sum-exp"):
        CanonicaliseFlex().run(Program(captures[0].graph_module))


def test_keeps_graphs_without_flex() -> None:
    def other(x: Tensor) -> tuple[Tensor]:
        return (nn.functional.scaled_dot_product_attention(x, x, x),)

    assert unchanged(CanonicaliseFlex(), program_of(other, call()["bias"]))
