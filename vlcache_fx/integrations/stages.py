"""A model of the transformers library as three functions of tensors, ready for ``torch.export``.

Nothing here imports transformers, except for the cache class that the model itself uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.encoder_cache import PIXELS
from vlcache_fx.integrations.items import Fields, concat_items, feature_fields
from vlcache_fx.integrations.transformers import OUTPUTS, EncodersFirst
from vlcache_fx.integrations.wrappers import Decode, Encoder, Prefill

Tensors = dict[str, Tensor]

IGNORED_ARGUMENTS = frozenset({"attention_mask", "mm_token_type_ids"})
"""Arguments without effect on a prompt with given positions and no padding."""


@dataclass(frozen=True)
class Stage:
    """One function to export.

    Attributes:
        module: takes ``inputs`` in order and returns a tuple of tensors named ``outputs``.
        inputs: example inputs by name.
        outputs: names of the outputs.
        dynamic: per input, dim -> name of the dynamic size.
    """

    module: nn.Module
    inputs: Tensors
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]

    def shapes(self, size: Callable[[str], Any]) -> Any:
        """Return ``dynamic`` as ``dynamic_shapes`` for exporters; ``size`` maps names to their dimensions.

        A trailing ``*args`` of ``forward`` is one tuple in it.
        """
        shapes = [{dim: size(n) for dim, n in self.dynamic[name].items()} for name in self.inputs]
        parameters = list(inspect.signature(self.module.forward).parameters.values())
        if parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
            return tuple(shapes)
        fixed = len(parameters) - 1
        return (*shapes[:fixed], tuple(shapes[fixed:]))


@dataclass(frozen=True)
class ItemEncoder:
    """An encoder for single items.

    Attributes:
        modality: ``image`` or ``video``.
        fixed: other tensors about the item, such as its grid of patches, as constants of the graph.
        stage: pixels of one item -> its features.
    """

    modality: str
    fixed: dict[str, tuple[int, ...]]
    stage: Stage


@dataclass(frozen=True)
class GenerationStages:
    """The stages of generation.

    Attributes:
        encoders: an encoder per modality and grid in the example.
        prefill: token ids, features and positions -> logits of the last token, keys and values.
        decode: one token and the cache -> logits, keys and values.
    """

    encoders: tuple[ItemEncoder, ...]
    prefill: Stage
    decode: Stage


def generation_stages(model: nn.Module, example: Mapping[str, Any]) -> GenerationStages | None:
    """Return the stages of a model of the transformers library; None for any other model.

    Args:
        model: the model.
        example: keyword arguments for one prompt without padding, with at least one image or video.

    Raises:
        ExportError: several prompts, padding, no image, or a cache other than keys and values per layer.
    """
    first = EncodersFirst(model)
    if not first.is_supported:
        return None
    _check_prompt(example)
    with torch.no_grad():
        _, given = first((), dict(example))
        outputs = given.pop(OUTPUTS, None) or {}
        joined = {modality: concat_items(output) for modality, output in outputs.items()}
        if not joined:
            raise ExportError("example_inputs hold no image or video: nothing in them could be reused")
        fields = {modality: feature_fields(output) or {} for modality, output in joined.items()}
        text = {
            name: value
            for name, value in given.items()
            if isinstance(value, Tensor)
            and name not in IGNORED_ARGUMENTS
            and not any(name in pair for pair in PIXELS.values())
        }
        kinds = {modality: type(output) for modality, output in joined.items()}
        prefill = Prefill(model, tuple(text), kinds, pytree.tree_structure(fields))
        inputs = text | _named_leaves(fields)
        results = prefill(*inputs.values())
    num_layers = (len(results) - 1) // 2
    caches = tuple(f"present.{i}.{what}" for i in range(num_layers) for what in ("key", "value"))
    return GenerationStages(
        encoders=tuple(encoder for name in joined for encoder in _encoders(model, name, example, fields)),
        prefill=Stage(
            prefill,
            inputs,
            ("logits", *caches),
            {name: _token_dims(name, value, text["input_ids"].shape[1]) for name, value in inputs.items()},
        ),
        decode=_decode(model, text, results[1:]),
    )


def _named_leaves(fields: dict[str, Fields]) -> Tensors:
    """Return the tensors of all fields by their path, such as ``image.deepstack_features.1``."""
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in pytree.tree_leaves_with_path(fields)
    }


def prompt_positions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the model's multimodal positions of a prompt, an input of exported graphs.

    Returns None if positions only count tokens. Weights are not read, so the model may be on the
    ``meta`` device.

    Args:
        model: a model of the transformers library.
        inputs: outputs of the processor.
    """
    text = {
        name: value for name, value in inputs.items() if name not in (pair[0] for pair in PIXELS.values())
    }
    return EncodersFirst(model).positions(text)


def _check_prompt(example: Mapping[str, Any]) -> None:
    ids, mask = example.get("input_ids"), example.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1:
        shown = list(ids.shape) if isinstance(ids, Tensor) else ids
        raise ExportError(f"example_inputs['input_ids'] must have the shape [1, tokens], not {shown}")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise ExportError("example_inputs['attention_mask'] hides tokens; exported graphs take no padding")


def _token_dims(name: str, value: Tensor, num_tokens: int) -> dict[int, str]:
    """Return the dynamic dimensions of an input, dim -> name: tokens, or the rows of features."""
    prefix = name.partition(".")[0]
    if prefix in PIXELS and "." in name:
        return {value.dim() - 2: f"{prefix}_tokens"}
    return {dim: "tokens" for dim, size in enumerate(value.shape) if size == num_tokens}


def _decode(model: nn.Module, text: Tensors, caches: Sequence[Tensor]) -> Stage:
    num_tokens = text["input_ids"].shape[1]
    token = text["input_ids"][:, -1:]
    positions = text.get("position_ids")
    position = torch.full((1, 1), num_tokens) if positions is None else positions[..., -1:] + 1
    names = [f"past.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(caches))]
    inputs = {"input_ids": token, "position_ids": position, **dict(zip(names, caches, strict=True))}
    outputs = ("logits", *(name.replace("past", "present") for name in names))
    dynamic: dict[str, dict[int, str]] = {name: {2: "past_tokens"} for name in names}
    return Stage(Decode(model), inputs, outputs, {"input_ids": {}, "position_ids": {}, **dynamic})


def _encoders(
    model: nn.Module, modality: str, example: Mapping[str, Any], fields: dict[str, Fields]
) -> list[ItemEncoder]:
    pixels, grids = PIXELS[modality]
    base: Any = getattr(model, "base_model", model)
    encode = getattr(base, f"get_{modality}_features")
    outputs = tuple(_named_leaves({modality: fields[modality]}))
    others = [name for name in inspect.signature(encode).parameters if name not in (pixels, "kwargs")]
    metadata = {name: example[name] for name in others if isinstance(example.get(name), Tensor)}
    kinds = {
        tuple((name, tuple(value.flatten().tolist())) for name, value in fixed.items()): (part, fixed)
        for part, fixed in split_pixels(example[pixels], metadata, grids)
    }
    return [
        ItemEncoder(
            modality,
            dict(kind),
            Stage(Encoder(encode, base, pixels, fixed), {pixels: part}, outputs, {pixels: {}}),
        )
        for kind, (part, fixed) in kinds.items()
    ]


def split_pixels(pixels: Tensor, metadata: Tensors, grids: str) -> list[tuple[Tensor, Tensors]]:
    """Return the pixels and the metadata of each item.

    Args:
        pixels: pixels of all items, [patches, ..] with grids, else [items, ..].
        metadata: other tensors about the items, [items, ..].
        grids: name of the metadata with the number of patches per item, as a product along the last dim.

    Raises:
        ExportError: the grids do not fit the pixels.
    """
    counts = metadata[grids].prod(-1).tolist() if grids in metadata else [1] * pixels.shape[0]
    if sum(counts) != pixels.shape[0]:
        raise ExportError(f"{grids} asks for {sum(counts)} rows of pixels, {pixels.shape[0]} are given")
    parts = torch.split_with_sizes(pixels, counts)
    return [
        (part, {name: value[index : index + 1] for name, value in metadata.items()})
        for index, part in enumerate(parts)
    ]
