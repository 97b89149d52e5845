"""Frontiers: keys and values without positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_attention import rotary_angles
from vlcache_fx.testing.tiny_vlm import tiny_vlm

from ...models import wired
from ..graphs import CALL, attend, capture, captured_vlm


def kinds(facts: DecoderFacts) -> list[tuple[str, str]]:
    def short(target: object) -> str:
        return getattr(target, "__name__", str(target)).partition(".")[0]

    return [(short(layer.key_frontier.target), short(layer.value_frontier.target)) for layer in facts.layers]


# Static sizes are in test_computation.py and in the tests of shared keys below.
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({"rope": "full"}, "linear", "linear"),
        ({"rope": "partial"}, "linear", "linear"),
        ({"rope": "none"}, "linear", "linear"),
        ({"rope": "interleaved"}, "linear", "linear"),
        ({"rope": "complex"}, "linear", "linear"),
        ({"rope": "full", "qk_norm": True}, "rms_norm", "linear"),
        ({"rope": "none", "qk_norm": True}, "rms_norm", "linear"),
        ({"rope": "full", "fused_qkv": True}, "getitem", "getitem"),
        ({"rope": "partial", "fused_qkv": True, "qk_norm": True}, "rms_norm", "getitem"),
        ({"rope": "full", "explicit_mask": True}, "linear", "linear"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_split_layer_frontiers(
    options: dict[str, object], key: str, value: str, dynamic: bool | None
) -> None:
    facts = analyze(captured_vlm(dynamic=dynamic, **options))
    assert kinds(facts) == [(key, value)] * 2


def test_split_layer_before_widening() -> None:
    """Complex products need float32, which would double the stored bytes."""
    model = tiny_vlm(rope="complex").to(torch.bfloat16)
    facts = analyze(captured_graph(model, CALL | {"pixel_values": CALL["pixel_values"].bfloat16()})[0])
    assert kinds(facts) == [("linear", "linear")] * 2
    assert {frontier.node.meta["val"].dtype for frontier in facts.frontiers} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options", [{}, {"fused_qkv": True, "rope": "partial"}, {"explicit_mask": True}], ids=str
)
def test_split_layer_parts_cover_layer(options: dict[str, object]) -> None:
    facts = analyze(captured_vlm(**options))
    for layer, members in zip(facts.layers, facts.stream.members, strict=True):
        parts = [*layer.kv_part, *layer.full_part, *layer.q_part]
        assert len(parts) == len(set(parts))
        assert set(parts) == set(members)
        assert layer.site.node in layer.q_part
        assert {layer.key_frontier, layer.value_frontier} <= set(layer.kv_part)
        assert not set(facts.taint) & set(layer.kv_part)


def decoder(x: Tensor, rotation: object, key: nn.Module, **tables: Tensor) -> Tensor:
    """One layer with keys ``rotation(key(x), **tables)``."""
    x = x * 2
    keys = rotation(key(x), **tables)  # type: ignore[operator]
    return x + F.scaled_dot_product_attention(x[:, None], keys[:, None], x[:, None], is_causal=True)[:, 0]


def frontier_of(rotation: object, **tables: Tensor) -> str:
    def one_layer(x: Tensor, key: nn.Module, **tables: Tensor) -> Tensor:
        return decoder(x, rotation, key, **tables)

    facts = analyze(capture(one_layer, {"x": torch.randn(1, 6, 4)}, key=nn.Linear(4, 4), **tables))
    return kinds(facts)[0][0]


def test_split_layer_chunked_halves() -> None:
    """The two halves are results of one operator; the tensor before it is stored."""

    def rotation(key: Tensor) -> Tensor:
        first, second = key.chunk(2, -1)
        cos, sin = rotary_angles(torch.arange(key.shape[1]), 2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    assert frontier_of(rotation) == "linear"


def test_split_layer_buffer_tables() -> None:
    """Cosines in a buffer are positions, though they depend on no input of the request."""

    def rotation(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[: key.shape[1]], sin[: key.shape[1]]
        return key * cos + torch.cat([-key[..., 2:], key[..., :2]], -1) * sin

    cos, sin = rotary_angles(torch.arange(64), 4)
    assert frontier_of(rotation, cos=cos, sin=sin) == "linear"


def test_split_layer_refuses_learned_positions() -> None:
    """They are part of the residual stream, so its keys depend on the position."""
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(captured_vlm(learned_positions=True))
    assert refusal.value.reason is Reason.POSITION_IN_STREAM
    assert refusal.value.node is not None
    assert "self.positions(position_ids)" in str(refusal.value.source_line)


def test_split_layer_refuses_positions_before_projection() -> None:
    def positions_per_layer(x: Tensor, positions: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys, values = key(x + positions)[:, None], key(x)[:, None]
        return x + F.scaled_dot_product_attention(x[:, None], keys, values, is_causal=True)[:, 0]

    call = {"x": torch.randn(1, 6, 4), "positions": torch.randn(1, 6, 4)}
    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(positions_per_layer, call, key=nn.Linear(4, 4)))
    assert refusal.value.reason is Reason.POSITION_IN_STREAM


def test_split_layer_refuses_keys_read_elsewhere() -> None:
    def peeking(x: Tensor, key: nn.Module) -> Tensor:
        x = x * 2
        keys = key(x) * torch.arange(x.shape[1])[:, None].cos()
        y = F.scaled_dot_product_attention(x[:, None], keys[:, None], x[:, None], is_causal=True)[:, 0]
        return x + y + keys

    with pytest.raises(UnsupportedGraphError) as refusal:
        analyze(capture(peeking, {"x": torch.randn(1, 6, 4)}, key=nn.Linear(4, 4)))
    assert refusal.value.reason is Reason.TOKEN_AXIS_LOST
    assert "full keys or values" in refusal.value.detail


def test_split_layer_returned_keys() -> None:
    def caching(x: Tensor, key: nn.Module) -> tuple[Tensor, Tensor]:
        x = x * 2
        keys = key(x) * torch.arange(x.shape[1])[:, None].cos()
        y = F.scaled_dot_product_attention(x[:, None], keys[:, None], x[:, None], is_causal=True)[:, 0]
        return (x + y)[:, -1], keys.transpose(1, 2)

    facts = analyze(capture(caching, {"x": torch.randn(1, 6, 4)}, key=nn.Linear(4, 4)))
    assert "transpose" in str([node.target for node in facts.layers[0].full_part])
    assert kinds(facts)[0][0] == "linear"


@pytest.mark.parametrize(
    ("kind", "last"), [("shared", (False, False)), ("shared values", (True, False)), ("side", (True, True))]
)
@pytest.mark.parametrize("explicit_mask", [False, True])
def test_split_layer_shared_keys_and_values(kind: str, last: tuple[bool, bool], explicit_mask: bool) -> None:
    """Shared keys and values are stored once, even if each layer repeats their heads."""
    facts = analyze(captured_graph(wired(kind, explicit_mask=explicit_mask), CALL)[0])
    own = [(layer.key_frontier is not None, layer.value_frontier is not None) for layer in facts.layers]
    assert own == [(True, True), (True, True), last]
    letters = [letter for letter, there in zip("kv", last, strict=True) if there]
    slots = [str(frontier.slot) for frontier in facts.frontiers]
    assert slots == ["0.k", "0.v", "1.k", "1.v", *[f"2.{letter}" for letter in letters]]
    for layer, members in zip(facts.layers, facts.stream.members, strict=True):
        assert {*layer.kv_part, *layer.full_part, *layer.q_part} == set(members)


def test_split_layer_values_of_earlier_layer() -> None:
    """They have all tokens there; the layer's own part is stored."""
    facts = analyze(captured_graph(wired("residual values"), CALL)[0])
    assert kinds(facts) == [("linear", "linear")] * 3
    for layer in facts.layers[1:]:
        assert any(node.target is torch.ops.aten.add.Tensor for node in layer.full_part)


def test_attend_is_causal() -> None:
    x = torch.randn(1, 4, 4)
    assert torch.allclose(attend(x)[:, :2], attend(x[:, :2]))
