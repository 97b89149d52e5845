"""Tiny vision-language models with random weights, and prompts for them.

Three models, all small enough to run in milliseconds on a CPU, in eval mode and reproducible by seed:

- ``tiny_qwen2_5_vl`` and ``tiny_llava`` are the ``transformers`` implementations (imported when called);
- ``tiny_vlm`` is hand-written in plain torch. Its attention, norms and positions are chosen by a
  ``DecoderShape``, so that a test can ask for the structure it is about.

``traced_graphs`` gives the graphs that ``torch.compile`` makes of such a model.

Prompts come from ``qwen_inputs``, ``llava_inputs`` and ``tiny_vlm_inputs``: a given number of text tokens
before and after one or more images, as keyword arguments of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.capture import Captured, capture_dynamo
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import CLEANUP

VOCABULARY = 200
TEXT_TOKENS = 180
"""Text of a prompt is drawn from the tokens below this; those above are special."""
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, BOS, EOS, PAD = 190, 191, 192, 193, 194, 195, 196

QWEN_PATCH, QWEN_MERGE = 4, 2
LLAVA_IMAGE_TOKENS = 36
LLAVA_IMAGE_SIZE = 24


def tiny_qwen2_5_vl(num_layers: int = 3, seed: int = 0, attention: str = "sdpa") -> Any:
    """A ``Qwen2_5_VLForConditionalGeneration``: M-RoPE, grouped K/V heads, windowed vision attention.

    Args:
        num_layers: decoder layers.
        seed: of the weights.
        attention: ``attn_implementation`` of the whole model.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    options: dict[str, Any] = {"attn_implementation": attention}
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": QWEN_PATCH,
            "out_hidden_size": 64,
            "spatial_merge_size": QWEN_MERGE,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        **options,
    )
    with _seeded(seed):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    return model.eval()


def tiny_llava(num_layers: int = 3, seed: int = 0, attention: str = "sdpa") -> Any:
    """A ``LlavaForConditionalGeneration``: CLIP vision tower, Llama decoder, 36 tokens per image.

    Args:
        num_layers: decoder layers.
        seed: of the weights.
        attention: ``attn_implementation`` of the whole model.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    options: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "attn_implementation": attention}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=LLAVA_IMAGE_SIZE,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_seq_length=LLAVA_IMAGE_TOKENS,
        **options,
    )
    with _seeded(seed):
        model: Any = LlavaForConditionalGeneration(config)
    return model.eval()


def qwen_inputs(
    before: int, after: int, images: Sequence[tuple[int, int, int]], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """A prompt for ``tiny_qwen2_5_vl``.

    Every image is one run of image tokens between a vision start and a vision end token; an image of a
    ``grid_h`` x ``grid_w`` grid (both even) fills ``grid_h * grid_w / 4`` tokens.

    Args:
        before: text tokens before the first image (so its run starts at ``before + 1``).
        after: text tokens behind the last image.
        images: ``(grid_h, grid_w, image seed)`` of each.
        text_seed: of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, attention_mask, mm_token_type_ids, and with images pixel_values and image_grid_thw.
    """
    runs = [
        [VISION_START, *[IMAGE_TOKEN] * (height * width // QWEN_MERGE**2), VISION_END]
        for height, width, _ in images
    ]
    inputs = _prompt(before, after, between, runs, text_seed)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    if images:
        row = 3 * 2 * QWEN_PATCH**2
        inputs["pixel_values"] = torch.cat(
            [_noise(seed, height * width, row) for height, width, seed in images]
        )
        inputs["image_grid_thw"] = torch.tensor([[1, height, width] for height, width, _ in images])
    return inputs


def llava_inputs(
    before: int, after: int, image_seeds: Sequence[int], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """A prompt for ``tiny_llava``; every image is a run of 36 image tokens.

    Args:
        before: text tokens before the first image (so its run starts there).
        after: text tokens behind the last image.
        image_seeds: one for each image.
        text_seed: of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, attention_mask, and with images pixel_values.
    """
    inputs = _prompt(
        before, after, between, [[IMAGE_TOKEN] * LLAVA_IMAGE_TOKENS for _ in image_seeds], text_seed
    )
    if image_seeds:
        size = LLAVA_IMAGE_SIZE
        inputs["pixel_values"] = torch.stack([_noise(seed, 3, size, size) for seed in image_seeds])
    return inputs


@dataclass(frozen=True)
class DecoderShape:
    """The structure of a ``TinyDecoder``.

    Attributes:
        num_layers: decoder layers.
        hidden: width of the residual stream.
        heads: query heads; ``kv_heads`` divides it.
        kv_heads: key and value heads.
        norm: kind of every norm of the stream.
        norm_place: norms before attention and MLP, behind them (on the branch), or behind the addition.
        rope: rotary embedding of whole heads, of their first half, or none.
        learned_positions: add an embedding of each token's position to the token embeddings.
        qk_norm: RMSNorm of every query and key head.
        fused_qkv: one projection for queries, keys and values.
        bias: biases in all projections.
        parallel: attention and MLP read the same normalised tokens and are added together.
        explicit_mask: a bool mask made in the graph, and repeated K/V heads, in place of ``is_causal``.
        last_only: return the last token's logits alone.
    """

    num_layers: int = 2
    hidden: int = 16
    heads: int = 2
    kv_heads: int = 1
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "branch", "post"] = "pre"
    rope: Literal["full", "partial", "none"] = "full"
    learned_positions: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    bias: bool = False
    parallel: bool = False
    explicit_mask: bool = False
    last_only: bool = True

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """How much of a head is rotated."""
        return {"full": self.head_dim, "partial": self.head_dim // 2, "none": 0}[self.rope]


class Attention(nn.Module):
    """Causal self-attention with grouped K/V heads."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_dim
        if shape.fused_qkv:
            self.qkv = nn.Linear(shape.hidden, shape.hidden + 2 * kv_width, bias=shape.bias)
        else:
            self.query = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)
            self.key = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
            self.value = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
        if shape.qk_norm:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(shape.head_dim, 1e-6),
                nn.RMSNorm(shape.head_dim, 1e-6),
            )
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [1, heads, tokens, head_dim], before positions enter."""
        shape = self.shape
        if shape.fused_qkv:
            kv_width = shape.kv_heads * shape.head_dim
            query, key, value = self.qkv(x).split([shape.hidden, kv_width, kv_width], dim=-1)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        query, key, value = (
            part.view(x.shape[0], x.shape[1], -1, shape.head_dim).transpose(1, 2)
            for part in (query, key, value)
        )
        if shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """Attention of all tokens to themselves and earlier ones."""
        query, key, value = self.project(x)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if mask is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            groups = self.shape.heads // self.shape.kv_heads
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.out(attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return result


class Mlp(nn.Module):
    """SiLU between two linear layers."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.hidden, bias=shape.bias)
        self.down = nn.Linear(2 * shape.hidden, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Token by token."""
        result: Tensor = self.down(F.silu(self.up(x)))
        return result


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention, self.mlp = Attention(shape), Mlp(shape)
        self.norm_1, self.norm_2 = _norm(shape), _norm(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """The residual stream behind this layer."""
        attention, mlp, place = self.attention, self.mlp, self.shape.norm_place
        if self.shape.parallel:
            normed = self.norm_1(x)
            x = x + attention(normed, rotary, mask) + mlp(normed)
        elif place == "pre":
            x = x + attention(self.norm_1(x), rotary, mask)
            x = x + mlp(self.norm_2(x))
        elif place == "branch":
            x = x + self.norm_1(attention(x, rotary, mask))
            x = x + self.norm_2(mlp(x))
        else:
            x = self.norm_1(x + attention(x, rotary, mask))
            x = self.norm_2(x + mlp(x))
        return x


class TinyDecoder(nn.Module):
    """Token embeddings to logits."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.hidden, VOCABULARY, bias=False)
        if shape.learned_positions:
            self.positions = nn.Embedding(512, shape.hidden)

    def forward(self, embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits of the last token or of all, [1, 1 or tokens, vocabulary]."""
        shape = self.shape
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)
        x = embeds + self.positions(position_ids) if shape.learned_positions else embeds
        rotary = rotary_angles(position_ids, shape.rotary_dim) if shape.rotary_dim else None
        mask = causal_mask(embeds.shape[1], embeds.device) if shape.explicit_mask else None
        for layer in self.layers:
            x = layer(x, rotary, mask)
        if shape.last_only:
            x = x[:, -1:]
        logits: Tensor = self.head(self.norm(x))
        return logits


class TinyVlm(nn.Module):
    """Patches through a linear encoder, merged into token embeddings, through a ``TinyDecoder``."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PATCH_WIDTH, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.hidden)
        )
        self.embed = nn.Embedding(VOCABULARY, shape.hidden)
        self.decoder = TinyDecoder(shape)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits; give ``pixel_values`` [patches, width] or the encoder's ``features``, or neither."""
        embeds = self.embed(input_ids)
        if pixel_values is not None:
            features = self.encoder(pixel_values)
        if features is not None:
            mask = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(mask, features)
        logits: Tensor = self.decoder(embeds, position_ids)
        return logits


PATCH_WIDTH = 6


def tiny_vlm(shape: DecoderShape | None = None, seed: int = 0, **options: Any) -> TinyVlm:
    """A ``TinyVlm`` in eval mode.

    Args:
        shape: of its decoder.
        seed: of the weights.
        options: fields of ``DecoderShape``, where ``shape`` is not given.
    """
    with _seeded(seed):
        model = TinyVlm(DecoderShape(**options) if shape is None else shape)
        for module in model.modules():  # norms of ones would let a lost weight go unseen
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model.eval()


def tiny_vlm_inputs(
    before: int, after: int, images: Sequence[tuple[int, int]], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """A prompt for ``tiny_vlm``; an image is one run of as many image tokens as it has patches.

    Args:
        before: text tokens before the first image (so its run starts there).
        after: text tokens behind the last image.
        images: ``(number of tokens, image seed)`` of each.
        text_seed: of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, and with images pixel_values.
    """
    inputs = _prompt(before, after, between, [[IMAGE_TOKEN] * tokens for tokens, _ in images], text_seed)
    del inputs["attention_mask"]
    if images:
        inputs["pixel_values"] = torch.cat([_noise(seed, tokens, PATCH_WIDTH) for tokens, seed in images])
    return inputs


@dataclass(frozen=True)
class TracedGraph:
    """What Dynamo calls a backend with, and the arguments of every call of the compiled result."""

    graph_module: torch.fx.GraphModule
    example_inputs: list[Any]
    calls: list[tuple[Any, ...]]


def traced_graphs(
    model: nn.Module,
    *calls: Mapping[str, Any],
    dynamic: bool | None = None,
    seen: Callable[[torch.fx.GraphModule, list[Any]], object] | None = None,
) -> list[TracedGraph]:
    """The graphs that ``torch.compile`` makes of ``model``, called with each of ``calls`` in order.

    Args:
        model: to be traced; nothing in it is changed.
        calls: keyword arguments.
        dynamic: as for ``torch.compile``.
        seen: called as a backend is, while Dynamo still knows where each input comes from.
    """
    graphs: list[TracedGraph] = []

    def record(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = TracedGraph(graph_module, list(example_inputs), [])
        graphs.append(graph)
        if seen is not None:
            seen(graph_module, example_inputs)

        def run(*args: Any) -> Any:
            graph.calls.append(args)
            return graph_module(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=record, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    return graphs


def captured_graph(
    model: nn.Module, *calls: Mapping[str, Any], dynamic: bool | None = None
) -> tuple[Captured, TracedGraph]:
    """The one graph of ``model`` for all ``calls``, captured and cleaned up as the backend does it."""
    captures: list[Captured] = []
    graphs = traced_graphs(
        model, *calls, dynamic=dynamic, seen=lambda *given: captures.append(capture_dynamo(*given))
    )
    (captured,), (graph,) = captures, graphs
    CLEANUP.run(Program(captured.graph_module))
    return captured, graph


def rotary_angles(position_ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [tokens, dim]."""
    frequencies = 100.0 ** -(torch.arange(0, dim, 2, device=position_ids.device) / dim)
    angles = position_ids[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first ``cos.shape[-1]`` entries of each head, [1, heads, tokens, head_dim]."""
    dim = cos.shape[-1]
    turned, kept = x[..., :dim], x[..., dim:]
    first, second = turned[..., : dim // 2], turned[..., dim // 2 :]
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if dim == x.shape[-1] else torch.cat([turned, kept], dim=-1)


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """[1, kv_heads, tokens, head_dim] to [1, kv_heads * groups, tokens, head_dim]."""
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def causal_mask(tokens: int, device: torch.device) -> Tensor:
    """Bool [1, 1, tokens, tokens], True where a key is not later than the query."""
    place = torch.arange(tokens, device=device)
    return (place[None, :] <= place[:, None])[None, None]


def _norm(shape: DecoderShape) -> nn.Module:
    return nn.RMSNorm(shape.hidden, 1e-6) if shape.norm == "rms" else nn.LayerNorm(shape.hidden)


def _prompt(
    before: int, after: int, between: int, runs: Sequence[Sequence[int]], text_seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(text_seed)

    def text(count: int) -> list[int]:
        return torch.randint(0, TEXT_TOKENS, (count,), generator=generator).tolist()

    tokens = text(before)
    for index, run in enumerate(runs):
        tokens += [*(text(between) if index else []), *run]
    ids = torch.tensor([[*tokens, *text(after)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights from ``seed`` without touching the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
