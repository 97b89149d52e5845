"""Which spans a request has, and the keys of what fills them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.dataflow import ancestors
from vlcache_fx.capture.subgraph import extract
from vlcache_fx.runtime.marks import marked_spans
from vlcache_fx.runtime.shifts import only_shifts, same_for_all
from vlcache_fx.store.keys import Part, content_digest


@dataclass(frozen=True)
class Run:
    """A run of consecutive tokens that one merge fills: first position, length, and its feature rows."""

    start: int
    length: int
    content: Tensor


@dataclass(frozen=True)
class Identifier:
    """Finds runs and their position patterns in the inputs of one graph.

    Attributes:
        masks: a small graph from the graph's inputs to the mask of each merge.
        features: per merge, the index of the input that holds its feature rows.
        embeddings: where there is no merge, the index of the input whose rows may be marked as spans.
        position_inputs: indices of inputs that positions are computed from.
        masks_only: those of them that masks of attentions are made of, and nothing else.
        has_past: True where the keys of the call may be joined with those of earlier calls.
        width: values per token of what is merged; None where there is no merge, or the graph takes any.
    """

    masks: fx.GraphModule
    features: tuple[int, ...]
    position_inputs: tuple[int, ...]
    embeddings: int | None = None
    masks_only: frozenset[int] = frozenset()
    has_past: bool = False
    width: int | None = None

    @classmethod
    def of(cls, module: fx.GraphModule, facts: DecoderFacts, data_inputs: Sequence[int]) -> "Identifier":
        """Build it from the facts of ``module``; every merge's features must be an input."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        index = {node: i for i, node in enumerate(placeholders)}
        used = {parent for step in facts.steps for parent in step.all_input_nodes if parent in facts.taint}
        used |= {
            p
            for layer in facts.layers
            for node in ancestors([layer.site.key, layer.site.value], layer.full_part)
            for p in node.all_input_nodes
            if p in facts.taint
        }
        reached = ancestors(used - facts.past)
        masks = {layer.site.mask for layer in facts.layers if layer.site.mask is not None}
        beside_masks = ancestors(used - facts.past - masks)
        width = facts.merges[-1].node.meta["val"].shape[-1] if facts.merges else None
        return cls(
            masks=extract(module, [merge.mask for merge in facts.merges]),
            features=tuple(index[merge.features] for merge in facts.merges),
            position_inputs=tuple(
                i for i in data_inputs if placeholders[i] in reached and not only_shifts(placeholders[i])
            ),
            masks_only=frozenset(i for i in data_inputs if placeholders[i] not in beside_masks),
            has_past=bool(facts.past),
            embeddings=None if facts.merges else index[facts.stream.boundaries[0]],
            width=width if isinstance(width, int) else None,
        )

    def runs(self, args: Sequence[Any]) -> tuple[int, list[Run]] | None:
        """``(number of tokens, runs in order)``, or None where placeholders and features do not agree."""
        if self.embeddings is not None:
            embeds = args[self.embeddings]
            marks = marked_spans(embeds)
            return embeds.shape[1], [
                Run(start, length, embeds[:, start : start + length]) for _, start, length in marks
            ]
        num_tokens, found = 0, []
        for mask, index in zip(self.masks(*args), self.features, strict=True):
            if self.width is not None and args[index].shape[-1] != self.width:
                return None
            flags = mask.reshape(mask.shape[-2], -1)[:, 0] if mask.dim() > 2 else mask.reshape(-1)
            num_tokens = flags.shape[0]
            places = flags.nonzero().flatten().cpu()
            features = args[index].reshape(-1, args[index].shape[-1])
            if len(places) != features.shape[0]:
                return None
            found.extend(_runs(places, features))
        return num_tokens, sorted(found, key=lambda run: run.start)

    def positions(self, args: Sequence[Any], run: Run, num_tokens: int) -> list[Part]:
        """The positions of the run relative to its first token, for the key.

        The same pixels laid out in another grid attend to each other differently.
        """
        parts: list[Part] = []
        for index in self.position_inputs:
            value = args[index]
            dims = [dim for dim, size in enumerate(value.shape) if size == num_tokens]
            if len(dims) >= 2 and dims[-2:] == [value.dim() - 2, value.dim() - 1]:
                continue  # a mask over pairs of tokens
            if index in self.masks_only and dims == [value.dim() - 2]:
                continue  # a mask over tokens and keys
            if len(dims) != 1:
                if not (self.has_past and same_for_all(value, num_tokens)):
                    parts.append(value)
                continue
            own = value.narrow(dims[0], run.start, run.length).movedim(dims[0], -1)
            if own.dtype == torch.bool and own.all():
                continue
            if own.is_floating_point() or own.dtype == torch.bool:
                parts.append(own)  # differences of cos and sin mean nothing: such donors serve one offset
                continue
            relative = own - own[..., :1]
            if not _says_nothing(relative):
                parts.append(relative)
        return parts


def _says_nothing(relative: Tensor) -> bool:
    """True for a constant, and for plain counting, which graphs without such an input do by themselves."""
    ramp = torch.arange(relative.shape[-1], dtype=relative.dtype, device=relative.device)
    return not relative.any() or bool((relative == ramp).all())


def _runs(places: Tensor, features: Tensor) -> list[Run]:
    """The runs of consecutive ``places`` (sorted, int64), with their rows of ``features``."""
    if not len(places):
        return []
    firsts = [0, *((places.diff() != 1).nonzero().flatten() + 1).tolist(), len(places)]
    return [
        Run(int(places[first]), after - first, features[first:after]) for first, after in pairwise(firsts)
    ]


def donor_key(run: Run, positions: list[Part], weights: str, salt: str) -> str:
    """The complete key of a donor: feature bytes, relative positions, weights, salt."""
    return content_digest(["donor", salt, weights, run.content, tuple(positions)])


def arithmetic(nodes: Iterable[fx.Node]) -> list[str]:
    """The operators on values among ``nodes`` with the floats in their arguments, each once.

    Part of a donor's key: equal weights under another activation or epsilon are another model. A set, since
    graphs of one model differ in views, copies and order.
    """
    found = set()
    for node in nodes:
        if node.op != "call_function" or node.target is torch.ops.aten.clone.default:
            continue
        floats = [value for value in node.args if isinstance(value, float)]
        if floats or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found.add(f"{node.target} {floats}")
    return sorted(found)
