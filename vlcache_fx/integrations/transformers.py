"""Hooks for models of the transformers library: an encoder cache per image.

Nothing here imports transformers. A model qualifies by what it offers:
``base_model.get_<modality>_features``, which ``generate()`` and ``forward`` call to run an encoder.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlcache_fx.errors import StoreError
from vlcache_fx.integrations.processor import kept_pixels
from vlcache_fx.ops import FastAttention
from vlcache_fx.runtime.encoder import packed, unpacked
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.store.keys import Part, content_digest

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
"""Per modality, the keyword of the pixels and of the grids that say how many rows of them each item has."""

Item: TypeAlias = tuple[Tensor, Tensor | None]
"""One image: its rows of the pixels, and its grid where there are grids."""


def hook_placeholder_check(model: nn.Module) -> bool:
    """Keep the model's check of placeholders from fixing the number of features; True where hooked.

    ``get_placeholder_mask(input_ids, inputs_embeds, image_features=None, ...)`` puts their number into the
    text of an error, so every number of vision tokens would be compiled anew. The same comparison is made
    here, with a text of its own.
    """
    base = getattr(model, "base_model", model)
    original = getattr(base, "get_placeholder_mask", None)
    if original is None:
        return False
    optional = [
        name
        for name, parameter in inspect.signature(original).parameters.items()
        if name.endswith("_features") and parameter.default is None
    ]
    if not optional:
        return False

    @functools.wraps(original)
    def get_placeholder_mask(input_ids: Any, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = dict(zip(optional, args, strict=False))
        features |= {name: kwargs.pop(name) for name in optional if name in kwargs}
        masks = original(input_ids, inputs_embeds, **kwargs)
        for mask, name in zip(masks if isinstance(masks, tuple) else (masks,), optional, strict=False):
            given = features.get(name)
            if given is not None:
                placeholders = mask.expand(inputs_embeds.shape).sum()
                torch._check_tensor_all(  # type: ignore[no-untyped-call]
                    placeholders == given.numel(),
                    lambda: "placeholder tokens and encoder features do not agree in number",
                )
        return masks

    base.get_placeholder_mask = get_placeholder_mask
    return True


def joined_items(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the features of each modality as one tensor, whatever number of items they come from.

    A list with a tensor per item (``mm_encoder_outputs[modality].pooler_output``) is the first thing that
    models concatenate; inside the graph, every number of items would be compiled anew.
    """
    outputs = kwargs.get("mm_encoder_outputs")
    if not isinstance(outputs, dict):
        return kwargs
    joined = {modality: _joined(output) for modality, output in outputs.items()}
    return {**kwargs, "mm_encoder_outputs": joined}


def restore_items(result: Any, kwargs: dict[str, Any]) -> None:
    """Give ``result`` the features that it hands through as they were before ``joined_items(kwargs)``."""
    outputs = kwargs.get("mm_encoder_outputs")
    for modality, output in outputs.items() if isinstance(outputs, dict) else ():
        name = f"{modality}_hidden_states"
        if isinstance(getattr(result, name, None), tuple) and isinstance(output.pooler_output, list | tuple):
            setattr(result, name, output.pooler_output)


def _joined(output: Any) -> Any:
    features = getattr(output, "pooler_output", None)
    if not isinstance(features, list | tuple) or len(features) < 2:
        return output
    if not all(isinstance(one, Tensor) and one.dim() == 2 for one in features):
        return output
    result = copy.copy(output)
    result.pooler_output = (torch.cat(tuple(features)),)
    return result


def hook_encoders(model: nn.Module, engine: Engine) -> list[str]:
    """Let ``model`` keep its encoder outputs in the engine's store; the modalities that were hooked."""
    base = getattr(model, "base_model", model)
    hooked = []
    for modality in PIXELS:
        name = f"get_{modality}_features"
        encode = getattr(base, name, None)
        if encode is None:
            continue
        encoder = EncoderCache(encode, base, modality, engine)
        untraced = torch.compiler.disable(encoder.__call__)  # type: ignore[no-untyped-call]
        setattr(base, name, functools.wraps(encode)(untraced))
        hooked.append(modality)
    return hooked


class EncoderCache:
    """Runs an encoder for the items whose output is not in the store.

    Items are told apart by their grids, or by the first dimension of the pixels; each is kept under its own
    content, so a request with a known and a new image encodes the new one alone. An encoder whose result is
    not a list with one tensor per item is called as it is.
    """

    def __init__(self, encode: Callable[..., Any], module: nn.Module, modality: str, engine: Engine) -> None:
        self._encode, self._module, self._engine = encode, module, engine
        self._pixels_name, self._grids_name = PIXELS[modality]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the encoder's own method (of which only ``pooler_output`` is kept)."""
        call = dict(zip((self._pixels_name, self._grids_name), args, strict=False)) | kwargs
        pixels, grids = call.get(self._pixels_name), call.get(self._grids_name)
        if len(args) > 2 or not isinstance(pixels, Tensor) or torch.is_grad_enabled():
            return self._encode(*args, **kwargs)
        items = _split(pixels, grids)
        if items is None:
            return self._encode(*args, **kwargs)
        others = {
            name: value for name, value in call.items() if name not in (self._pixels_name, self._grids_name)
        }
        keys = self._keys(self._contents(pixels, items), [grid for _, grid in items], others)
        if keys is None:
            return self._encode(*args, **kwargs)
        found = [self._get(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        self._engine.note_encoder(hit=not missing)
        if not missing:
            return _output(found)
        part = dict(others)
        part[self._pixels_name] = torch.cat([items[index][0] for index in missing])
        if grids is not None:
            part[self._grids_name] = torch.stack([items[index][1] for index in missing])  # type: ignore[misc]
        output = self._run(part)
        features = getattr(output, "pooler_output", None)
        if not isinstance(features, list | tuple) or len(features) != len(missing):
            return output if len(missing) == len(items) else self._encode(*args, **kwargs)
        for index, value in zip(missing, features, strict=True):
            found[index] = value
            self._put(keys[index], value)
        return _output(found)

    def _run(self, call: dict[str, Any]) -> Any:
        with FastAttention() if self._engine.lowering.name == "inductor" else contextlib.nullcontext():
            return self._encode(**call)

    def _contents(self, pixels: Tensor, items: list[Item]) -> list[str]:
        """A digest per item. Pixels that a ``CachedImageProcessor`` gives out again are not read again."""
        kept, layout = kept_pixels(pixels), tuple(item.shape[0] for item, _ in items)
        digests = None if kept is None else kept.digests.get(layout)
        if digests is None:
            digests = [content_digest([item]) for item, _ in items]
        if kept is not None:
            kept.digests[layout] = digests
        return digests

    def _keys(
        self, contents: list[str], grids: list[Tensor | None], others: dict[str, Any]
    ) -> list[str] | None:
        """One key per item; None where an argument cannot be part of a key."""
        # Which weights an encoder reads is not visible here; all of the model's are a safe superset. Listed
        # in every call, because adapters add parameters and loading can replace them.
        weights = self._engine.weights_fingerprint([*self._module.parameters(), *self._module.buffers()])
        try:
            settings: list[Part] = [(name, _plain(others[name])) for name in sorted(others)]
            salt = self._engine.options.salt
            return [
                content_digest(["features", salt, weights, content, grid, tuple(settings)])
                for content, grid in zip(contents, grids, strict=True)
            ]
        except StoreError:
            return None

    def _get(self, key: str) -> Tensor | None:
        entry = None
        with self._engine.tolerating_store_errors():
            entry = self._engine.store.get(key)
        stored = None if entry is None else unpacked(entry)
        return None if stored is None else stored[0]

    def _put(self, key: str, features: Tensor) -> None:
        with self._engine.tolerating_store_errors():
            self._engine.store.put(key, packed([features]))


def _output(features: list[Any]) -> Any:
    """One tensor per item, in the class that models return.

    The same class for hits and misses, because a compiled model is specialised to it.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    per_item: Any = tuple(features)  # declared as one tensor, but models return one per item
    return BaseModelOutputWithPooling(pooler_output=per_item)


def _plain(value: Any) -> Part:
    return str(value) if isinstance(value, torch.dtype) else value


def _split(pixels: Tensor, grids: Any) -> list[Item] | None:
    if grids is None:
        return (
            [(pixels[index : index + 1], None) for index in range(pixels.shape[0])]
            if pixels.dim() > 2
            else None
        )
    counts = [int(count) for count in grids.prod(-1).tolist()]
    if sum(counts) != pixels.shape[0]:
        return None
    return list(zip(torch.split_with_sizes(pixels, counts), grids.unbind(0), strict=True))
