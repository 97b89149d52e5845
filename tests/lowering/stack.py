"""A small Llama-like stack, and its trace to the flat pre-dispatch ATen graph of lowerings."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last dim."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Norm(nn.Module):
    """RMS norm over the last dim."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> [..., width]."""
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Layer(nn.Module):
    """One decoder layer: norm, grouped-query attention with RoPE, norm, SwiGLU."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, kv_heads * self.size)
        self.v = nn.Linear(width, kv_heads * self.size)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[1, S, width] -> the new residual stream, K and V."""
        batch, length, _ = x.shape
        h = self.norm1(x)
        q = self.q(h).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(h).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(h).view(batch, length, self.kv_heads, self.size).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(a.transpose(1, 2).reshape(batch, length, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h)), k, v


class Stack(nn.Module):
    """Layers between a RoPE prelude and a norm + head tail."""

    def __init__(
        self,
        layers: int = 3,
        width: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        inner: int = 96,
        vocabulary: int = 50,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm = Norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        size = width // heads
        self.register_buffer(
            "inv", 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size), persistent=False
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[1, S, width] -> logits of the last token and every layer's K and V."""
        position = torch.arange(x.shape[1], device=x.device).float()
        angle = torch.cat([position[:, None] * self.get_buffer("inv")[None]] * 2, dim=-1)[None, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        caches = []
        for layer in self.layers:
            x, k, v = layer(x, cos, sin)
            caches += [k, v]
        return (self.head(self.norm(x)[:, -1:]), *caches)


def splice(donor: torch.Tensor, fresh: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """[D, w] and [n, w] -> [S, w]: donor row ``source`` if it is >= 0, else fresh row ``-source - 1``."""
    kept = donor.index_select(0, source.clamp(min=0))
    computed = fresh.index_select(0, (-source - 1).clamp(min=0))
    return torch.where((source >= 0)[:, None], kept, computed)


class WarmLayer(nn.Module):
    """A ``Layer`` on some rows, with the other rows' K and V from donors."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        row: torch.Tensor,
        keep: torch.Tensor,
        source: torch.Tensor,
        donors: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """x [1, n, width], cos and sin [1, 1, S, d], row [n], keep [m], source [S], donors [D, w]."""
        layer, total = self.layer, cos.shape[2]
        h = layer.norm1(x)
        shape = (1, total, layer.kv_heads, layer.size)
        k = splice(donors[0], layer.k(h)[0], source).view(shape).transpose(1, 2)
        v = splice(donors[1], layer.v(h)[0], source).view(shape).transpose(1, 2)
        k = k * cos + rotate_half(k) * sin
        row, x, h = row.index_select(0, keep), x.index_select(1, keep), h.index_select(1, keep)
        q = layer.q(h).view(1, x.shape[1], layer.heads, layer.size).transpose(1, 2)
        q = q * cos.index_select(2, row) + rotate_half(q) * sin.index_select(2, row)
        mask = (torch.arange(total, device=row.device)[None] <= row[:, None])[None, None]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=layer.heads != layer.kv_heads)
        x = x + layer.o(a.transpose(1, 2).reshape(1, x.shape[1], -1))
        h = layer.norm2(x)
        return x + layer.down(F.silu(layer.gate(h)) * layer.up(h)), k, v


class Warm(nn.Module):
    """The layers of a ``Stack`` on row sets that shrink with depth."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WarmLayer(cast(Layer, layer)) for layer in stack.layers)
        self.norm, self.head = stack.norm, stack.head

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        keeps: tuple[torch.Tensor, ...],
        sources: tuple[torch.Tensor, ...],
        donors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        """Per layer: the row set, the rows kept for the next layer, the sources of K and V, two donors."""
        caches: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers):
            x, k, v = layer(x, cos, sin, rows[i], keeps[i], sources[i], (donors[2 * i], donors[2 * i + 1]))
            caches += [k, v]
        return (self.head(self.norm(x)[:, -1:]), *caches)


def segment_of(node: torch.fx.Node) -> str | None:
    """Return the tag of a node, from the module ``layers.<n>`` in its stack."""
    found: str | None = None
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        match = re.search(r"layers[.']*\[?(\d+)", str(path))
        if match:
            found = f"layer.{match[1]}"
        elif re.search(r"\b(norm|head)$", str(path)) and found is None:
            found = "tail"
    return found


def trace(
    model: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]
) -> tuple[GraphModule, list[Any]]:
    """Trace to a flat tagged graph; ``dynamic`` has the symbolic dims of each tensor, nested like ``inputs``.

    Returns the graph module, and its lifted parameters and buffers, which come before the inputs.
    """

    def shape(dims: Any) -> Any:
        if isinstance(dims, tuple):
            return tuple(map(shape, dims))
        return dict.fromkeys(dims, torch.export.Dim.DYNAMIC)

    with torch.no_grad():
        exported = torch.export.export(model, inputs, dynamic_shapes=shape(dynamic), strict=False)
    program = GraphModule(exported.graph_module, exported.graph_module.graph)
    lifted = [
        exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        for spec in exported.graph_signature.input_specs
        if spec.target is not None
    ]
    seen = False
    for node in program.graph.nodes:
        if node.op == "call_function":
            tag = segment_of(node)
            seen = seen or bool(tag)
            node.meta["segment"] = tag or ("tail" if seen else "prelude")
    return program, lifted
