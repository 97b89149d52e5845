"""A cache of encoder outputs, item by item, for models of the transformers library."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlcache_fx.errors import StoreError, UnreadableWeightsError
from vlcache_fx.integrations.items import Fields, feature_fields, join_items, split_items
from vlcache_fx.integrations.module_state import ModuleState
from vlcache_fx.integrations.module_tensors import ModuleTensors
from vlcache_fx.integrations.object_graph import SMALL_BYTES
from vlcache_fx.keys.digest import Part
from vlcache_fx.keys.digest_cache import digest_rows, row_ranges
from vlcache_fx.keys.entry_key import EntryKey, KeyScope
from vlcache_fx.keys.numerics import device_type_of, numerics
from vlcache_fx.ops import FastAttention
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.costs import RunCost, nbytes_of
from vlcache_fx.runtime.requests.media_spans import MediaItems
from vlcache_fx.store.codec import pack, unpack

if TYPE_CHECKING:
    from vlcache_fx.compiler.engine import Engine

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
"""Per modality, the keywords of the pixels and the grids; a grid's product is its item's rows of pixels."""

Item: TypeAlias = dict[str, Tensor]
"""The tensor arguments of an encoder for one item."""

UNSPLIT = "unsplit"
"""Form of a field that cannot be split into items (see ``vlcache_fx.integrations.items``)."""


class EncoderCache:
    """Runs an encoder for the items without a cached output.

    Calls are split into items by their grids, or along the first dimension of the pixels. Each item is cached
    under its content, so a request with a known and a new image encodes only the new image. If arguments or
    results cannot be split, the call is cached as one item. Only the fields of ``feature_fields`` are cached.

    Args:
        encode: the encoder, with the pixels as first parameter and the grids, if any, as second.
        module: the model; its weights and state are part of the keys.
        modality: ``image`` or ``video``.
        engine: owns the store, options and counters.
    """

    def __init__(self, encode: Callable[..., Any], module: nn.Module, modality: str, engine: Engine) -> None:
        self.encode, self._module, self._engine, self._modality = encode, module, engine, modality
        self._tensors = ModuleTensors(module, min_bytes=SMALL_BYTES + 1)
        self._state = ModuleState(module, encode, weights=self._tensors)
        self._pixels_name, self.grids_name = PIXELS[modality]
        self._classes: dict[str, type] = {}
        self._cost = RunCost()
        self._split = True  # until a result cannot be split into items

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name."""
        return dict(zip((self._pixels_name, self.grids_name), args, strict=False)) | dict(kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments and return the result of the encoder's own method."""
        grids = self.arguments(args, kwargs).get(self.grids_name)
        # Before the encoder runs: reading a tensor on a GPU would wait for it.
        patches = grids.tolist() if isinstance(grids, Tensor) and grids.dim() == 2 else ()
        output = self._encoded(args, kwargs)
        features = getattr(output, "pooler_output", None)
        if isinstance(features, list | tuple) and all(isinstance(item, Tensor) for item in features):
            self._engine.pending.note_items(
                self._modality, MediaItems.of_patches([item.shape[0] for item in features], patches)
            )
        return output

    def _encoded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = self.arguments(args, kwargs)
        pixels = call.get(self._pixels_name)
        if len(args) > 2 or not isinstance(pixels, Tensor) or torch.is_grad_enabled():
            return self.encode(*args, **kwargs)
        items = self._items(call) if self._split else None
        if items is None or len(items) < 2:
            return self._undivided(call)
        keys = self._keys(items, call)
        if keys is None:
            return self.encode(*args, **kwargs)
        outputs = [self._get(key) for key in keys]
        missing = [index for index, stored in enumerate(outputs) if stored is None]
        if missing:
            output = self._run(call | _joined([items[index] for index in missing]))
            fields = feature_fields(output)
            parts = None if fields is None else split_items(fields, len(missing))
            if parts is None:
                self._split = False
                key = self._keys([_tensors(call)], call) if len(missing) == len(items) else None
                return self._undivided(call) if key is None else self._store_undivided(key[0], output)
            for index, part in zip(missing, parts, strict=True):
                outputs[index] = (type(output).__name__, part)
                self._put(keys[index], type(output), part)
        result = self._result(outputs)
        self._note(hit=not missing and result is not None)
        return self.encode(*args, **kwargs) if result is None else result

    def _undivided(self, call: dict[str, Any]) -> Any:
        """Encode or look up a call as one item."""
        keys = self._keys([_tensors(call)], call)
        if keys is None:
            return self.encode(**call)
        stored = self._get(keys[0])
        result = None if stored is None else self._result([stored])
        self._note(hit=result is not None)
        return self._store_undivided(keys[0], self._run(call)) if result is None else result

    def _store_undivided(self, key: str, output: Any) -> Any:
        fields = feature_fields(output)
        if fields is None:
            return output
        items = split_items(fields, 1) or [{name: (UNSPLIT, value) for name, value in fields.items()}]
        self._put(key, type(output), items[0])
        return self._result([(type(output).__name__, items[0])]) or output

    def _note(self, *, hit: bool) -> None:
        """The encoder was skipped, or runs: the report of the decoder's next call will say so."""
        self._engine.count("encoder_hits" if hit else "encoder_misses")
        self._engine.pending.note_encoder(hit=hit)

    def _run(self, call: dict[str, Any]) -> Any:
        is_fast, clock = self._engine.lowering.name == "inductor", Clock()
        with FastAttention() if is_fast else contextlib.nullcontext(), clock.measure("encode"):
            output = self.encode(**call)
        self._cost.note(clock.elapsed_ms["encode"], nbytes_of(pytree.tree_leaves(feature_fields(output))))
        self._classes[type(output).__name__] = type(output)
        return output

    def _items(self, call: dict[str, Any]) -> list[Item] | None:
        """Return the tensors of each item, or None if the arguments cannot be split."""
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

    def _keys(self, items: list[Item], call: dict[str, Any]) -> list[EntryKey] | None:
        """Return a key per item, or None if an argument or a weight cannot be part of a key."""
        # The weights that an encoder reads are unknown here; the model's are a safe superset. They are listed
        # in every call, because adapters add parameters and loading can replace them.
        state = self._state.digest()
        if state is None or self._module.training:  # encoders may apply dropout in training
            return None
        try:
            weights = self._engine.fingerprints.of(self._tensors())
        except UnreadableWeightsError as error:
            self._engine.refuse_weights(error)
            return None
        settings = [(name, _plain(call[name])) for name in sorted(call) if not isinstance(call[name], Tensor)]
        lengths = [item[self._pixels_name].shape[0] for item in items]
        arithmetic = numerics(device_type_of(call.values()))
        scope = KeyScope(self._engine.options.key_salt, weights)
        common = {"state": state, "numerics": arithmetic, "modality": self._pixels_name}
        try:
            contents = digest_rows(call[self._pixels_name], row_ranges(lengths), threaded=True)
            return [
                scope.key(
                    "features",
                    {
                        **common,
                        "content": content,
                        "fields": tuple(_named(item, but=self._pixels_name)),
                        "settings": tuple(settings),
                    },
                )
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
            self._engine.store.put(key, pack(results, cost_ms=self._cost.of(nbytes_of(leaves))))

    def _class(self, name: str) -> type | None:
        """Return the output class of that name, from an earlier call or from the model's module."""
        modules = (type(self._module).__module__, "transformers.modeling_outputs")
        imported = [getattr(sys.modules.get(module), name, None) for module in modules]
        candidates = (kind for kind in (self._classes.get(name), *imported) if kind is not None)
        kind = next(candidates, None)
        return kind if isinstance(kind, type) and issubclass(kind, dict) else None

    def _result(self, items: list[Any]) -> Any:
        """Return an output of the model's own class, to which a compiled model is specialised.

        Returns None if the items cannot be joined.
        """
        names = {name for name, _ in items}
        output_class = self._class(names.pop()) if len(names) == 1 else None
        if output_class is None:
            return None
        parts = [item for _, item in items]
        if any(form == UNSPLIT for form, _ in parts[0].values()):
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
