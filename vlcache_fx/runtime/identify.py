"""Which runs of media a request has, and the keys of what fills them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.dataflow import ancestors
from vlcache_fx.analysis.merge import Addition, Merge
from vlcache_fx.capture.subgraph import extract, on_cpu
from vlcache_fx.runtime.marks import marked_spans
from vlcache_fx.runtime.runs import Run, flagged_places, runs_of, token_flags, with_additions
from vlcache_fx.runtime.shifts import only_shifts, same_for_all
from vlcache_fx.store.keys import Part, content_digest
from vlcache_fx.store.known import known_rows

EMBEDDING = torch.ops.aten.embedding.default


@dataclass(frozen=True)
class Identifier:
    """Finds runs and their position patterns in the inputs of one graph.

    Attributes:
        masks: a small graph from the graph's inputs to the mask of each merge and addition.
        on_host: indices of the inputs that ``masks`` reads on the CPU; empty where it runs on the device.
        features: per merge and addition, the index of the input that holds its feature rows.
        num_merges: how many of these are merges; additions follow.
        embeddings: where there is no merge, the index of the input whose rows may be marked as spans.
        position_inputs: indices of inputs that positions are computed from.
        looked_up: those of them that name rows of a table, as token ids do: what they are counts, not how
            they differ from each other.
        masks_only: those of them that masks of attentions are made of, and nothing else.
        has_past: True where the keys of the call may be joined with those of earlier calls.
        width: values per token of what is merged; None where there is no merge, or the graph takes any.
    """

    masks: Callable[..., Sequence[Tensor]]
    features: tuple[int, ...]
    num_merges: int
    position_inputs: tuple[int, ...]
    looked_up: frozenset[int] = frozenset()
    embeddings: int | None = None
    masks_only: frozenset[int] = frozenset()
    has_past: bool = False
    width: int | None = None
    on_host: tuple[int, ...] = ()

    @classmethod
    def of(cls, module: fx.GraphModule, facts: DecoderFacts, data_inputs: Sequence[int]) -> "Identifier":
        """Build it from the facts of ``module``; every merge's features must be an input."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        index = {node: i for i, node in enumerate(placeholders)}
        full = [
            node
            for layer in facts.layers
            for node in ancestors([layer.site.key, layer.site.value], layer.full_part)
        ]
        used = {p for node in (*facts.steps, *full) for p in node.all_input_nodes if p in facts.taint}
        used -= {addition.node for addition in facts.additions}  # their rows are part of a run's content
        used -= facts.past
        reached = ancestors(used)
        masks = {layer.site.mask for layer in facts.layers if layer.site.mask is not None}
        beside_masks = ancestors(used - masks)
        tables = ancestors(node.all_input_nodes[-1] for node in reached if node.target is EMBEDDING)
        width = facts.merges[-1].node.meta["val"].shape[-1] if facts.merges else None
        places: list[Merge | Addition] = [*facts.merges, *facts.additions]
        place_masks, on_host = _on_host(extract(module, [place.mask for place in places]), data_inputs)
        return cls(
            masks=place_masks,
            on_host=on_host,
            features=tuple(index[place.features] for place in places),
            num_merges=len(facts.merges),
            position_inputs=tuple(
                i for i in data_inputs if placeholders[i] in reached and not only_shifts(placeholders[i])
            ),
            looked_up=frozenset(i for i in data_inputs if placeholders[i] in tables),
            masks_only=frozenset(i for i in data_inputs if placeholders[i] not in beside_masks),
            has_past=bool(facts.past),
            embeddings=None if facts.merges else index[facts.stream.boundaries[0]],
            width=width if isinstance(width, int) else None,
        )

    def runs(
        self, args: Sequence[Any], items: Sequence[Sequence[int]] = ()
    ) -> tuple[int, int, list[Run]] | None:
        """``(samples, tokens of each, runs in order)``; None where placeholders and features do not agree.

        Args:
            args: the graph's inputs.
            items: where it is known, the rows of features of each item, per modality. Items that follow each
                other without text between them, such as frames, are runs of their own then.
        """
        if self.embeddings is not None:
            embeds = args[self.embeddings]
            return *embeds.shape[:2], [
                Run(sample, start, length, (embeds[sample, start : start + length],))
                for sample, start, length in marked_spans(embeds)
            ]
        samples, tokens, found = 1, 0, []
        read = list(args)
        for index in self.on_host:
            read[index] = args[index].cpu()
        for place, (mask, index) in enumerate(zip(self.masks(*read), self.features, strict=True)):
            if self.width is not None and args[index].shape[-1] != self.width:
                return None
            flags = token_flags(mask)
            samples, tokens = flags.shape
            places = flagged_places(flags)
            features = args[index].reshape(-1, args[index].shape[-1])
            if len(places) != features.shape[0]:
                return None
            known = known_rows(args[index]) if args[index].dim() == features.dim() else {}
            if place < self.num_merges:
                lengths = next((one for one in items if sum(one) == len(places)), ())
                found.extend(runs_of(places, features, tokens, lengths, known))
            else:
                extended = with_additions(found, places, features, tokens, known)
                if extended is None:
                    return None
                found = extended
        return samples, tokens, sorted(found, key=lambda run: (run.sample, run.start))

    def positions(self, args: Sequence[Any], run: Run, num_samples: int, num_tokens: int) -> list[Part]:
        """The positions of the run relative to its first token, for the key.

        The same pixels laid out in another grid attend to each other differently.
        """
        parts: list[Part] = []
        for index in self.position_inputs:
            value = of_sample(args[index], run.sample, num_samples, num_tokens)
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
            if index in self.looked_up or own.is_floating_point() or own.dtype == torch.bool:
                parts.append(own)  # differences of cos and sin mean nothing: such donors serve one offset
                continue
            if index in self.masks_only and not own.all() and own.max() <= 1:
                parts.append(own == 0)  # hidden tokens: what is computed for them is no good elsewhere
            relative = own - own[..., :1]
            if not _says_nothing(relative):
                parts.append(relative)
        return parts


def _on_host(
    masks: fx.GraphModule, data_inputs: Sequence[int]
) -> tuple[Callable[..., Sequence[Tensor]], tuple[int, ...]]:
    """``masks`` on the CPU, and the inputs that it reads there, where whole numbers tell everything."""
    placeholders = masks.graph.find_nodes(op="placeholder")
    read = {index: node for index, node in enumerate(placeholders) if node.users and _is_tensor(node)}
    tells_all = all(index in data_inputs and is_whole(node) for index, node in read.items())
    moved = on_cpu(masks) if tells_all else None
    return (masks, ()) if moved is None else (moved, tuple(read))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def is_whole(node: fx.Node) -> bool:
    """True for a tensor of whole numbers, flags included."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _says_nothing(relative: Tensor) -> bool:
    """True for a constant, and for plain counting, which graphs without such an input do by themselves."""
    ramp = torch.arange(relative.shape[-1], dtype=relative.dtype, device=relative.device)
    return not relative.any() or bool((relative == ramp).all())


def of_sample(value: Any, sample: int, num_samples: int, num_tokens: int) -> Any:
    """The part of an input that belongs to one sample; all of it where samples have no dimension.

    Samples are the first dimension, or the one in front of the tokens (``[3, batch, tokens]``).
    """
    if num_samples == 1 or not isinstance(value, Tensor):
        return value
    dims = [dim - 1 for dim, size in enumerate(value.shape) if size == num_tokens and dim > 0]
    for dim in (*dims, 0):
        if value.dim() > 0 and value.shape[dim] == num_samples:
            return value.narrow(dim, sample, 1)
    return value


def donor_key(run: Run, positions: list[Part], weights: str, salt: str) -> str:
    """The complete key of a donor: feature bytes, relative positions, weights, salt."""
    return content_digest(["donor", salt, weights, run.digests, tuple(positions)])


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
