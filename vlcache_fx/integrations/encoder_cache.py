"""The encoder of a model of the transformers library, item by item through the store."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlcache_fx.errors import StoreError, UnreadableWeightsError
from vlcache_fx.integrations.items import Fields, feature_fields, join_items, split_items
from vlcache_fx.integrations.module_state import SMALL_BYTES, ModuleState
from vlcache_fx.integrations.module_tensors import ModuleTensors
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.digest_cache import digest_rows, row_ranges
from vlcache_fx.lowering.numerics import device_type_of, numerics
from vlcache_fx.ops import FastAttention
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.store.codec import pack, unpack

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
"""Per modality, the keyword of the pixels and of the grids that say how many rows of them each item has."""

Item: TypeAlias = dict[str, Tensor]
"""The tensors that an encoder is given for one item."""

WHOLE = "whole"
"""How a field is held that does not tell items apart."""


class EncoderCache:
    """Runs an encoder for the items whose output is not in the store.

    Items are told apart by their grids, or by the first dimension of the pixels; each is kept under its own
    content, so a request with a known and a new image encodes the new one alone. Where arguments or results
    do not tell items apart, the call is kept as a whole. Of a result, the features are kept, not what the
    encoder's blocks return beside them.

    Args:
        encode: the encoder, with the pixels as its first parameter and the grids, if any, as its second.
        module: the model; all its weights, and all else that it is made of, are part of the keys.
        modality: ``image`` or ``video``.
        engine: has the store.
    """

    def __init__(self, encode: Callable[..., Any], module: nn.Module, modality: str, engine: Engine) -> None:
        self.encode, self._module, self._engine, self._modality = encode, module, engine, modality
        self._tensors = ModuleTensors(module, min_bytes=SMALL_BYTES + 1)
        self._state = ModuleState(module, encode, weights=self._tensors)
        self._pixels_name, self.grids_name = PIXELS[modality]
        self._classes: dict[str, type] = {}
        self._split = True  # until a result turns up that does not tell items apart

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return dict(zip((self._pixels_name, self.grids_name), args, strict=False)) | dict(kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the encoder's own method."""
        output = self._encoded(args, kwargs)
        features = getattr(output, "pooler_output", None)
        if isinstance(features, list | tuple) and all(isinstance(one, Tensor) for one in features):
            self._engine.note_items(self._modality, [one.shape[0] for one in features])
        return output

    def _encoded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = self.arguments(args, kwargs)
        pixels = call.get(self._pixels_name)
        if len(args) > 2 or not isinstance(pixels, Tensor) or torch.is_grad_enabled():
            return self.encode(*args, **kwargs)
        items = self._items(call) if self._split else None
        if items is None or len(items) < 2:
            return self._one(call)
        keys = self._keys(items, call)
        if keys is None:
            return self.encode(*args, **kwargs)
        found = [self._get(key) for key in keys]
        missing = [index for index, entry in enumerate(found) if entry is None]
        if missing:
            output = self._run(call | _joined([items[index] for index in missing]))
            fields = feature_fields(output)
            parts = None if fields is None else split_items(fields, len(missing))
            if parts is None:
                self._split = False
                whole = self._keys([_tensors(call)], call) if len(missing) == len(items) else None
                return self._one(call) if whole is None else self._kept_whole(whole[0], output)
            for index, part in zip(missing, parts, strict=True):
                found[index] = (type(output).__name__, part)
                self._put(keys[index], type(output), part)
        result = self._result(found)
        self._engine.note_encoder(hit=not missing and result is not None)
        return self.encode(*args, **kwargs) if result is None else result

    def _one(self, call: dict[str, Any]) -> Any:
        """A call that is one item, or is kept as a whole."""
        keys = self._keys([_tensors(call)], call)
        if keys is None:
            return self.encode(**call)
        stored = self._get(keys[0])
        result = None if stored is None else self._result([stored])
        self._engine.note_encoder(hit=result is not None)
        return self._kept_whole(keys[0], self._run(call)) if result is None else result

    def _kept_whole(self, key: str, output: Any) -> Any:
        fields = feature_fields(output)
        if fields is None:
            return output
        items = split_items(fields, 1) or [{name: (WHOLE, value) for name, value in fields.items()}]
        self._put(key, type(output), items[0])
        return self._result([(type(output).__name__, items[0])]) or output

    def _run(self, call: dict[str, Any]) -> Any:
        with FastAttention() if self._engine.lowering.name == "inductor" else contextlib.nullcontext():
            output = self.encode(**call)
        self._classes[type(output).__name__] = type(output)
        return output

    def _items(self, call: dict[str, Any]) -> list[Item] | None:
        """The tensors of each item; None where the arguments do not tell items apart."""
        pixels, grids = call[self._pixels_name], call.get(self.grids_name)
        others = _tensors(call)
        del others[self._pixels_name]
        if isinstance(grids, Tensor):
            counts = [int(count) for count in grids.prod(-1).tolist()]
            if sum(counts) != pixels.shape[0]:
                return None
            parts = list(torch.split_with_sizes(pixels, counts))
        elif pixels.dim() > 2:
            parts = list(pixels.split(1))
        else:
            return None
        if any(value.dim() == 0 or value.shape[0] != len(parts) for value in others.values()):
            return None
        return [
            {self._pixels_name: part, **{name: value[index : index + 1] for name, value in others.items()}}
            for index, part in enumerate(parts)
        ]

    def _keys(self, items: list[Item], call: dict[str, Any]) -> list[str] | None:
        """One key per item; None where an argument, or a weight, cannot be part of a key."""
        # Which weights an encoder reads is not visible here; all of the model's are a safe superset. Listed
        # in every call, because adapters add parameters and loading can replace them.
        state = self._state.digest()
        if state is None or self._module.training:  # in training, encoders may drop values at random
            return None
        try:
            weights = self._engine.fingerprints.of(self._tensors())
        except UnreadableWeightsError as error:
            self._engine.refuse_weights(error)
            return None
        settings = [(name, _plain(call[name])) for name in sorted(call) if not isinstance(call[name], Tensor)]
        lengths = [item[self._pixels_name].shape[0] for item in items]
        numbers = numerics(device_type_of(call.values()))
        start = ["features", self._engine.options.salt, weights, state, numbers, self._pixels_name]
        try:
            contents = digest_rows(call[self._pixels_name], row_ranges(lengths), threaded=True)
            return [
                content_digest([*start, content, *_named(item, but=self._pixels_name), tuple(settings)])
                for content, item in zip(contents, items, strict=True)
            ]
        except StoreError:
            return None

    def _get(self, key: str) -> tuple[str, Fields] | None:
        entry = None
        with self._engine.tolerating_store_errors():
            entry = self._engine.store.get(key)
        stored = None if entry is None else unpack(entry)
        if stored is None or not isinstance(stored[0], str) or self._class(stored[0]) is None:
            return None
        return stored[0], pytree.tree_unflatten(stored[2:], pytree.treespec_loads(stored[1]))

    def _put(self, key: str, output_class: type, item: Fields) -> None:
        leaves, structure = pytree.tree_flatten(item)
        if not all(isinstance(leaf, Tensor | str) for leaf in leaves):
            return
        # NotImplementedError: a container type that pytree cannot serialize.
        with contextlib.suppress(NotImplementedError), self._engine.tolerating_store_errors():
            results = [output_class.__name__, pytree.treespec_dumps(structure), *leaves]
            self._engine.store.put(key, pack(results))

    def _class(self, name: str) -> type | None:
        """The output class of that name, as seen here or as the model's module knows it."""
        modules = (type(self._module).__module__, "transformers.modeling_outputs")
        known = [getattr(sys.modules.get(module), name, None) for module in modules]
        found = next((one for one in (self._classes.get(name), *known) if one is not None), None)
        return found if isinstance(found, type) and issubclass(found, dict) else None

    def _result(self, items: list[Any]) -> Any:
        """An output of the class that the model returns, for hits and misses alike.

        A compiled model is specialised to the class. None where the items do not fit together.
        """
        names = {name for name, _ in items}
        output_class = self._class(names.pop()) if len(names) == 1 else None
        if output_class is None:
            return None
        parts = [item for _, item in items]
        if any(form == WHOLE for form, _ in parts[0].values()):
            return output_class(**{name: value for name, (_, value) in parts[0].items()})
        fields = join_items(parts)
        return None if fields is None else output_class(**fields)


def _tensors(call: dict[str, Any]) -> Item:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def _joined(items: list[Item]) -> Item:
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def _named(item: Item, *, but: str) -> list[Part]:
    return [(name, item[name]) for name in sorted(item) if name != but]


def _plain(value: Any) -> Part:
    return str(value) if isinstance(value, torch.dtype) else value
