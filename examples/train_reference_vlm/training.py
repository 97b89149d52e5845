"""Data and losses of a training step of the reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from examples.train_reference_vlm.config import HIDDEN
from examples.train_reference_vlm.packing import IGNORE, encode_row, pack
from vlcache_fx.testing.reference_vlm.data import (
    MAX_SYSTEM_WORDS,
    draw_digits,
    draw_partner,
    draw_question,
    draw_scans,
    draw_system_prompt,
    image_count,
)
from vlcache_fx.testing.reference_vlm.images import COLUMNS, MAX_ROWS, MIN_ROWS, render_grids
from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor
from vlcache_fx.testing.reference_vlm.scans import FloatArray, Scans, load_scans

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """One kind of batch: ``conversations`` rows of ``questions`` questions each, drawn from ``families``."""

    families: tuple[str, ...]
    question_first: bool
    conversations: int
    questions: int
    rows: tuple[int, int] = (MIN_ROWS, MAX_ROWS)
    system_words: int = MAX_SYSTEM_WORDS


def augment(rng: np.random.Generator, ink: FloatArray) -> FloatArray:
    """Turn, shear, stretch and shift scans ``[n, 8, 8]`` a little; change their contrast and add noise."""
    count = len(ink)

    def draw(limit: float) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, count).astype(np.float32))

    angle, shear = draw(0.22), draw(0.15)
    wide, tall = draw(0.12).exp(), draw(0.12).exp()
    rows = [
        torch.stack([angle.cos() * wide, shear - angle.sin() * tall, draw(0.18)], -1),
        torch.stack([angle.sin() * wide, angle.cos() * tall, draw(0.12)], -1),
    ]
    scans = torch.from_numpy(ink)[:, None]
    grid = F.affine_grid(torch.stack(rows, 1), list(scans.shape), align_corners=False)
    moved = F.grid_sample(scans, grid, mode="bicubic", align_corners=False)[:, 0].numpy()
    contrast = 1.0 + rng.uniform(-0.2, 0.2, (count, 1, 1))
    noise = rng.standard_normal(moved.shape) * rng.uniform(0.0, 0.04, (count, 1, 1))
    return np.clip(moved * contrast + noise, 0.0, 1.0).astype(np.float32)


class BatchMaker:
    """Draws training batches from the train scans, deterministic by seed."""

    def __init__(self, words: dict[str, int], seed: int) -> None:
        self.words = words
        self.rng = np.random.default_rng([seed, 1])
        self.scans: Scans = load_scans("train")
        self.image_processor = ReferenceImageProcessor()

    def pictures(self, digits: np.ndarray[Any, Any]) -> tuple[FloatArray, np.ndarray[Any, Any]]:
        """Patches and grids of freshly augmented pictures of ``digits [n, rows, columns]``."""
        chosen = draw_scans(self.rng, self.scans, digits)
        ink = augment(self.rng, self.scans.ink[chosen.reshape(-1)]).reshape(*digits.shape, 8, 8)
        return self.image_processor.patchify(render_grids(ink))

    def encoder_batch(self, pictures: int, rows: tuple[int, int] = (MIN_ROWS, MAX_ROWS)) -> Batch:
        """Pictures with what each vision token shows: ``targets [tokens, 3]`` are digit, row and column."""
        height = int(self.rng.integers(rows[0], rows[1] + 1))
        digits = self.rng.integers(10, size=(pictures, height, COLUMNS))
        patches, grids = self.pictures(digits)
        _, row, column = np.indices(digits.shape)
        targets = np.stack([digits, row, column], -1).reshape(-1, 3)
        return {
            "pixel_values": torch.from_numpy(patches),
            "image_grid_thw": torch.from_numpy(grids),
            "targets": torch.from_numpy(targets),
        }

    def batch(self, recipe: Recipe) -> Batch:
        """One batch of conversations, all with pictures and system prompts of the same drawn sizes."""
        rng, conversations = self.rng, recipe.conversations
        pictures = image_count(recipe.families[0])
        rows = [int(rng.integers(recipe.rows[0], recipe.rows[1] + 1)) for _ in range(pictures)]
        digits = [draw_digits(rng, conversations, rows[0])]
        if pictures == 2:
            digits.append(draw_partner(rng, digits[0], rows[1]))
        parts = [self.pictures(grid) for grid in digits]
        length = int(rng.integers(recipe.system_words + 1))
        packed = []
        for number in range(conversations):
            grids = [grid[number] for grid in digits]
            families = [
                recipe.families[int(i)] for i in rng.integers(len(recipe.families), size=recipe.questions)
            ]
            asked = [draw_question(rng, family, grids) for family in families]
            system = draw_system_prompt(rng, length)
            packed.append(encode_row(self.words, system, rows, asked, recipe.question_first))
        tensors = pack(self.words, packed, rows)
        pixels = np.concatenate(
            [part[0].reshape(conversations, -1, part[0].shape[-1]) for part in parts], axis=1
        )
        tensors["pixel_values"] = torch.from_numpy(pixels.reshape(-1, pixels.shape[-1]))
        grids_thw = np.stack([part[1] for part in parts], 1).reshape(-1, 3)
        tensors["image_grid_thw"] = torch.from_numpy(grids_thw)
        return tensors


class Guide:
    """Guides one attention head: cross-entropy of its weights against the answer's cells.

    Only training uses it, and only at first: finding the cell by the answer's loss alone takes far longer.
    """

    def __init__(self, model: Any, layer: int = 2, head: int = 0) -> None:
        self.attention = model.model.language_model.layers[layer].self_attn
        self.rope = dict(model.config.text_config.rope_parameters)
        self.head = head
        self.hidden = torch.empty(0)
        self.handle = self.attention.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def remove(self) -> None:
        """Remove the hook from the model."""
        self.handle.remove()

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """M-RoPE for one head: ``vectors [..., d]`` at ``positions [3, ...]``."""
        half = vectors.shape[-1] // 2
        frequency = self.rope["rope_theta"] ** (-torch.arange(half, device=vectors.device) / half)
        axis = torch.tensor([i for i, n in enumerate(self.rope["mrope_section"]) for _ in range(n)])
        angle = positions.movedim(0, -1)[..., axis.to(vectors.device)] * frequency
        left, right = vectors[..., :half], vectors[..., half:]
        turned = [left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()]
        return torch.cat(turned, -1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean over the answering tokens that have a cell to look at."""
        attention, sources, positions = self.attention, batch["sources"], batch["position_ids"]
        size, group = attention.head_dim, self.head // attention.num_key_value_groups
        row, token = sources.sum(-1).nonzero(as_tuple=True)
        wanted = sources[row, token]
        query = attention.q_proj(self.hidden[row, token])[:, self.head * size : (self.head + 1) * size]
        key = attention.k_proj(self.hidden)[..., group * size : (group + 1) * size]
        query = self.rotate(query.float(), positions[:, row, token])
        key = self.rotate(key.float(), positions)[row]
        scores = torch.einsum("nd,nsd->ns", query, key) * attention.scaling
        scores = scores.masked_fill(~batch["attention_mask"][row, 0, token], float("-inf"))
        found = scores.log_softmax(-1)[:, : wanted.shape[-1]]
        found = found.masked_fill(wanted == 0, 0.0)
        loss: torch.Tensor = -((found * wanted).sum(-1) / wanted.sum(-1)).mean()
        return loss


def initialise(model: Any) -> None:
    """Draw the decoder's weights at a scale that suits its small width (the stock 0.02 drowns the words)."""
    for name, weight in model.named_parameters():
        if "visual" in name or weight.ndim != 2:
            continue
        if "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=0.7)
        elif "lm_head" in name:
            torch.nn.init.normal_(weight, std=0.02)
        else:
            narrow = 0.25 if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=narrow * weight.shape[1] ** -0.5)


def answer_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answer tokens, and the share of answer words that are the likeliest word."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "sources")}
    logits = model(**inputs, use_cache=False).logits
    wanted = labels != IGNORE
    logits, labels = logits[wanted].float(), labels[wanted]
    right = (logits.argmax(-1) == labels).float()[::2].mean()
    return F.cross_entropy(logits, labels), right.detach()


def token_codes(seed: int) -> torch.Tensor:
    """Draw one direction per digit, row and column: ``[10 + MAX_ROWS + COLUMNS, HIDDEN]``, orthogonal.

    The sum of three has a root mean square of 1, about that of a word's embedding.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.empty(10 + MAX_ROWS + COLUMNS, HIDDEN)
    return torch.nn.init.orthogonal_(codes, gain=(HIDDEN / 3) ** 0.5, generator=generator)


def encoder_loss(model: Any, codes: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean squared distance of the vision tokens from the summed codes of what they show.

    A cross-entropy would leave ambiguous scans with weak digits and clear ones with strong digits, and
    attention that counts digits by their strength would miscount.
    """
    tokens = model.model.visual(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    digit, row, column = batch["targets"].unbind(1)
    wanted = codes[digit] + codes[10 + row] + codes[10 + MAX_ROWS + column]
    return F.mse_loss(tokens.float(), wanted)
