"""A Llama decoder of the transformers library that computes chosen rows of an item in each layer.

For studies of schedules that no policy can ask for. One prompt, one item, no compilation; plain PyTorch on
the modules of the model. With equal rows, it computes what a warm program computes.

In layer l, the item's keys and values are those of a donor, except in the rows ``carried[l]``, which have a
hidden state. Of these, the rows ``computed[l]`` run attention and MLP; the others add the donor's difference
between the layer's output and its input (*donor-delta skipping*). Rows that are not in ``carried[l + 1]``
end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlcache_fx.errors import OptionError

Fit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(contexts [C, n, heads, width], rows [R], exact [R, heads, width]) -> rows [n, heads, width]."""


@dataclass(frozen=True)
class Item:
    """An item as a decoder computed it in one context, or in several, stacked.

    Attributes:
        keys, values: per layer, [contexts, n, heads, width]; keys without positions.
        hidden: the input of each layer and the output of the last, [contexts, layers + 1, n, hidden].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden: Tensor

    @classmethod
    def stack(cls, items: Sequence[Item]) -> Item:
        """Return one item with the contexts of all."""
        return cls(
            tuple(torch.cat(layer) for layer in zip(*(item.keys for item in items), strict=True)),
            tuple(torch.cat(layer) for layer in zip(*(item.values for item in items), strict=True)),
            torch.cat([item.hidden for item in items]),
        )

    def first(self, contexts: int) -> Item:
        """Return the item with its first contexts."""
        keys, values = (tuple(rows[:contexts] for rows in stored) for stored in (self.keys, self.values))
        return Item(keys, values, self.hidden[:contexts])


@dataclass(frozen=True)
class Schedule:
    """Rows of an item per layer, int64, in order.

    Attributes:
        carried: rows with a hidden state; those of a layer are among those of the layer before.
        computed: those of them that run attention and MLP.
    """

    carried: tuple[Tensor, ...]
    computed: tuple[Tensor, ...]

    @classmethod
    def of_counts(cls, counts: Sequence[int], skipped: Sequence[int] = ()) -> Schedule:
        """The item's first rows, so many per layer; in the layers ``skipped`` they add the donor's delta."""
        rows = {count: torch.arange(count) for count in {0, *counts}}
        carried = tuple(rows[count] for count in counts)
        computed = tuple(rows[0] if layer in skipped else found for layer, found in enumerate(carried))
        return cls(carried, computed)

    def cost(self, length: int, key_value_share: float) -> float:
        """Return the work in the item's rows, as a share of that of all its rows in all layers.

        Args:
            length: rows of the item.
            key_value_share: work of a row's key and value, as a share of the row's in a layer.
        """
        spent = 0.0
        for carried, after, computed in zip(
            self.carried, (*self.carried[1:], self.carried[-1][:0]), self.computed, strict=True
        ):
            going_on = torch.isin(computed, after).sum().item()
            spent += key_value_share * len(carried) + (1 - key_value_share) * going_on
        return spent / (length * len(self.carried))


class LlamaRows:
    """Runs the decoder of a model.

    Args:
        model: with a causal language model of Llama layers somewhere in it.

    Raises:
        OptionError: the model has no decoder of Llama layers.
    """

    def __init__(self, model: Any) -> None:
        from transformers.models.llama.modeling_llama import LlamaModel

        found = [module for module in model.modules() if isinstance(module, LlamaModel)]
        if len(found) != 1:
            raise OptionError(f"{type(model).__name__} has {len(found)} decoders of Llama layers, not one")
        self.decoder: Any = found[0]
        self.head = model.get_output_embeddings()
        attention: Any = self.decoder.layers[0].self_attn
        self.width = attention.head_dim
        in_layer = sum(weight.numel() for weight in self.decoder.layers[0].parameters() if weight.dim() > 1)
        own = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
        self.key_value_share = own / in_layer
        """Work of a row's key and value, as a share of the row's in a layer; attention's own is left out."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.decoder.layers)

    @torch.no_grad()
    def record(self, embeds: Tensor, start: int, length: int, last: int) -> tuple[Item, Tensor]:
        """Compute a prompt in full.

        Args:
            embeds: [tokens, hidden].
            start, length: where the item is.
            last: number of positions to predict.

        Returns:
            The item in this context, and logits [last, vocabulary].
        """
        rows = torch.arange(length)
        layers = (rows,) * self.num_layers
        return self._run(embeds, start, length, last, Schedule(layers, layers), None, None)

    @torch.no_grad()
    def reuse(
        self,
        embeds: Tensor,
        start: int,
        item: Item,
        last: int,
        schedule: Schedule,
        fit: Fit | None = None,
    ) -> Tensor:
        """Compute a prompt with a donor: the mean of the item's contexts, or what ``fit`` makes of them.

        Returns:
            Logits, [last, vocabulary].
        """
        length = item.keys[0].shape[1]
        return self._run(embeds, start, length, last, schedule, item, fit)[1]

    def _run(
        self,
        embeds: Tensor,
        start: int,
        length: int,
        last: int,
        schedule: Schedule,
        item: Item | None,
        fit: Fit | None,
    ) -> tuple[Item, Tensor]:
        tokens = len(embeds)
        positions = torch.arange(tokens)
        cos, sin = (part[0].unsqueeze(1) for part in self.decoder.rotary_emb(embeds[None], positions[None]))
        outside = torch.cat([positions[:start], positions[start + length :]])
        empty = outside[:0]
        states = embeds.clone()
        keys, values, hidden = [], [], [states[start : start + length]]
        ends = (*schedule.carried[1:], empty if item is not None else schedule.carried[-1])
        for number, layer in enumerate(self.decoder.layers):
            carried, after = schedule.carried[number], ends[number]
            active = torch.cat([outside, carried + start]).sort().values
            key, value = self._project(layer, states[active])
            stored = (None, None) if item is None else (item.keys[number], item.values[number])
            full_key = self._spliced(key, active, tokens, start, carried, stored[0], fit)
            full_value = self._spliced(value, active, tokens, start, carried, stored[1], fit)
            keys.append(full_key[start : start + length])
            values.append(full_value[start : start + length])
            going_on = schedule.computed[number]
            going_on = going_on[torch.isin(going_on, after)]
            queries = torch.cat([outside, going_on + start]).sort().values
            output = self._layer(layer, states[queries], queries, full_key, full_value, cos, sin)
            skipped = after[torch.isin(after, going_on, invert=True)]
            states = states.clone()
            states[queries] = output
            if item is not None and len(skipped):
                delta = (item.hidden[:, number + 1] - item.hidden[:, number]).mean(0)
                states[start + skipped] += delta[skipped]
            hidden.append(states[start : start + length])
        logits: Tensor = self.head(self.decoder.norm(states[-last - 1 : -1]))
        made = Item(
            tuple(rows[None] for rows in keys),
            tuple(rows[None] for rows in values),
            torch.stack(hidden)[None],
        )
        return made, logits.float()

    def _project(self, layer: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        normed = layer.input_layernorm(rows)
        key, value = (project(normed) for project in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        return key.unflatten(-1, (-1, self.width)), value.unflatten(-1, (-1, self.width))

    @staticmethod
    def _spliced(
        own: Tensor,
        active: Tensor,
        tokens: int,
        start: int,
        carried: Tensor,
        contexts: Tensor | None,
        fit: Fit | None,
    ) -> Tensor:
        """Return keys or values of all tokens, [tokens, heads, width]."""
        full = own.new_zeros(tokens, *own.shape[1:])
        full[active] = own
        if contexts is not None:
            exact = full[start + carried]
            if fit is not None and len(carried) and len(contexts) > 1:
                rows = fit(contexts, carried, exact)
            else:
                rows = contexts.mean(0)
            full[start : start + contexts.shape[1]] = rows
            full[start + carried] = exact
        return full

    def _layer(
        self,
        layer: Any,
        rows: Tensor,
        positions: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        query = layer.self_attn.q_proj(layer.input_layernorm(rows)).unflatten(-1, (-1, self.width))
        query = rotated(query, cos[positions], sin[positions])
        placed = rotated(key, cos, sin)
        seen = torch.arange(len(key)) <= positions[:, None]
        mixed = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            placed.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=seen,
            scale=layer.self_attn.scaling,
            enable_gqa=True,
        )
        states = rows + layer.self_attn.o_proj(mixed[0].transpose(0, 1).flatten(1))
        result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
        return result


def rotated(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rows with their positions (rotary embedding, halves)."""
    first, second = rows.chunk(2, -1)
    return rows * cos + torch.cat([-second, first], -1) * sin
