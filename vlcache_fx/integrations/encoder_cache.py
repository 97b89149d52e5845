"""A cache of encoder outputs, item by item, for models of the transformers library."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlcache_fx.compiling import no_compilation
from vlcache_fx.errors import StoreError, UnreadableWeightsError
from vlcache_fx.integrations.encoder_weights import Dependence, EncoderWeights
from vlcache_fx.integrations.items import Fields, feature_fields, join_items, split_items
from vlcache_fx.keys.digest import Part
from vlcache_fx.keys.digest_cache import digest_rows, row_ranges
from vlcache_fx.keys.entry_key import EntryKey, KeyScope, parts_of
from vlcache_fx.keys.numerics import device_type_of, numerics
from vlcache_fx.ops import FastAttention
from vlcache_fx.runtime.in_flight import Claim, Missing
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.requests.media_spans import MediaItems
from vlcache_fx.store.codec import pack, unpack

if TYPE_CHECKING:
    from vlcache_fx.compiler.engine import Engine

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
"""Per modality, the keywords of the pixels and the grids; a grid's product is its item's rows of pixels.

Encoders of other modalities have no grids; their first parameter stands for the pixels.
"""

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
        encode: the encoder, with the pixels as first parameter and the grids, if any, as second. Of another
            modality than those of ``PIXELS``, its first parameter has a name.
        module: the model; its weights and state are part of the keys, without its decoder's weights if the
            encoder does not read them (``EncoderWeights``).
        modality: ``image``, ``video`` or another one, such as ``audio``.
        engine: owns the store, options and counters.
    """

    def __init__(self, encode: Callable[..., Any], module: nn.Module, modality: str, engine: Engine) -> None:
        self.encode, self._module, self._engine, self._modality = encode, module, engine, modality
        self._weights = EncoderWeights(module, encode)
        self._parameters = _parameters(encode) or PIXELS[modality]
        self._pixels_name, self.grids_name = PIXELS.get(modality, (self._parameters[0], ""))
        self._classes: dict[str, type] = {}
        self._pace = Pace()
        self._split = True  # until a result cannot be split into items

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name."""
        return dict(zip(self._parameters, args, strict=False)) | dict(kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the arguments and return the result of the encoder's own method."""
        grids = self.arguments(args, kwargs).get(self.grids_name)
        # Before the encoder runs: reading a tensor on a GPU would wait for it.
        patches = grids.tolist() if isinstance(grids, Tensor) and grids.dim() == 2 else ()
        self._engine.pending.note_parts(self._modality, ())
        with self._engine.stage("encoder"):
            output = self._encoded(args, kwargs)
        features = getattr(output, "pooler_output", None)
        if isinstance(features, list | tuple) and all(isinstance(item, Tensor) for item in features):
            items = MediaItems.of_patches([item.shape[0] for item in features], patches)
            self._engine.pending.note_items(self._modality, items)
        if isinstance(features, Tensor):
            features = features.unbind() if features.dim() > 2 else (features,)
        if features is not None:
            rows = [item.flatten(0, -2) for item in features if isinstance(item, Tensor) and item.dim() > 1]
            self._engine.pending.note_features(self._modality, rows)
        return output

    def _encoded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self._engine.options.dry_run:
            return self.encode(*args, **kwargs)
        call = self.arguments(args, kwargs)
        pixels = call.get(self._pixels_name)
        if len(args) > 2 or not isinstance(pixels, Tensor) or torch.is_grad_enabled():
            return self.encode(*args, **kwargs)
        began = self._engine.clears.number
        items = self._items(call) if self._split else None
        if items is None or len(items) < 2:
            return self._undivided(call, began)
        found = self._keys(items, call)
        if found is None:
            return self.encode(*args, **kwargs)
        keys, dependence = found
        outputs, claim = self._find_or_claim(keys, items)
        missing = [index for index, stored in enumerate(outputs) if stored is None]
        with claim:
            if missing:
                new = call | _joined([items[index] for index in missing])
                output, keys = self._run(new, keys, dependence, lambda: self._keys(items, call))
                fields = feature_fields(output)
                parts = None if fields is None else split_items(fields, len(missing))
                if parts is None:
                    self._split = False
                    claim.end(())
                    found = self._keys([_tensors(call)], call) if len(missing) == len(items) else None
                    if found is None:
                        return self._undivided(call, began)
                    return self._store_undivided(found[0], output, began, claim, call)
                stored_keys = []
                for index, part in zip(missing, parts, strict=True):
                    outputs[index] = (type(output).__name__, part)
                    if keys:
                        units = items[index][self._pixels_name].numel()
                        stored_keys += self._put(keys[index], type(output), part, began, units)
                claim.end(stored_keys)
        result = self._result(outputs)
        self._note(hit=not missing and result is not None)
        return self.encode(*args, **kwargs) if result is None else result

    def _find_or_claim(
        self, keys: Sequence[EntryKey], items: Sequence[Item]
    ) -> tuple[list[tuple[str, Fields] | None], Claim]:
        """Return the stored outputs, None for the missing ones, and the claim on these."""

        def missing(found: list[tuple[str, Fields] | None]) -> Missing:
            absent = [index for index, stored in enumerate(found) if stored is None]
            units = sum(items[index][self._pixels_name].numel() for index in absent)
            return self._engine.missing([keys[index] for index in absent], self._pace.seconds(units))

        return self._engine.find_or_claim(lambda _: [self._get(key) for key in keys], missing)

    def _undivided(self, call: dict[str, Any], began: int) -> Any:
        """Encode or look up a call as one item."""
        found = self._keys([_tensors(call)], call)
        if found is None:
            return self.encode(**call)
        keys, dependence = found
        (stored,), claim = self._find_or_claim(keys, [_tensors(call)])
        with claim:
            result = None if stored is None else self._result([stored])
            self._note(hit=result is not None)
            if result is not None:
                return result
            output, keys = self._run(call, keys, dependence, lambda: self._keys([_tensors(call)], call))
            return self._store_undivided(keys, output, began, claim, call)

    def _store_undivided(
        self, keys: Sequence[EntryKey], output: Any, began: int, claim: Claim, call: dict[str, Any]
    ) -> Any:
        fields = feature_fields(output)
        if fields is None or not keys:
            claim.end(())
            return output
        items = split_items(fields, 1) or [{name: (UNSPLIT, value) for name, value in fields.items()}]
        claim.end(self._put(keys[0], type(output), items[0], began, call[self._pixels_name].numel()))
        return self._result([(type(output).__name__, items[0])]) or output

    def _note(self, *, hit: bool) -> None:
        """The encoder was skipped, or runs: the report of the decoder's next call will say so."""
        self._engine.count("encoder_hits" if hit else "encoder_misses")
        self._engine.pending.note_encoder(hit=hit)

    def _run(
        self,
        call: dict[str, Any],
        keys: list[EntryKey],
        dependence: Dependence,
        again: Callable[[], tuple[list[EntryKey], Dependence] | None],
    ) -> tuple[Any, list[EntryKey]]:
        """Encode; return the output and the keys to store it under, none if these are unknown.

        Args:
            call: arguments of the encoder.
            keys: keys that were looked up.
            dependence: what they cover.
            again: computes the keys again, if the run shows that they cover too little.
        """
        is_fast = self._engine.lowering.name == "inductor"

        def encode() -> Any:
            timing = self._engine.timing(self._pace, call[self._pixels_name].numel())
            with no_compilation(), FastAttention() if is_fast else contextlib.nullcontext(), timing:
                return self.encode(**call)

        output, held = self._weights.run(encode, dependence)
        self._classes[type(output).__name__] = type(output)
        found = (keys, dependence) if held else again()
        return output, [] if found is None else found[0]

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

    def _keys(self, items: list[Item], call: dict[str, Any]) -> tuple[list[EntryKey], Dependence] | None:
        """Return a key per item and what they cover; None if something cannot be part of a key."""
        if self._module.training:  # encoders may apply dropout
            return None
        try:
            # In every call, because adapters add parameters and loading can replace them.
            dependence = self._weights.current()
            if dependence.state is None:
                return None
            weights = self._engine.fingerprints.of(dependence.weights)
        except UnreadableWeightsError as error:
            self._engine.refuse_weights(error)
            return None
        settings = [(name, _plain(call[name])) for name in sorted(call) if not isinstance(call[name], Tensor)]
        lengths = [item[self._pixels_name].shape[0] for item in items]
        arithmetic = numerics(device_type_of(call.values()))
        scope = KeyScope(self._engine.key_salt, weights)
        state = (dependence.state, dependence.unread_dtypes)
        common: dict[str, Part] = {"state": state, "numerics": arithmetic, "modality": self._pixels_name}
        try:
            contents = digest_rows(call[self._pixels_name], row_ranges(lengths), threaded=True)
            keys = [
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
        self._engine.pending.note_parts(self._modality, [key.parts for key in keys])
        return keys, dependence

    def _get(self, key: str) -> tuple[str, Fields] | None:
        stored = None
        with self._engine.tolerating_store_errors():
            entry = self._engine.store.get(key)
            stored = None if entry is None else unpack(entry)
        if stored is None or not isinstance(stored[0], str) or self._class(stored[0]) is None:
            return None
        return stored[0], pytree.tree_unflatten(stored[2:], pytree.treespec_loads(stored[1]))

    def _put(self, key: str, output_class: type, item: Fields, began: int, units: int) -> list[str]:
        """Store an output; return its key, or nothing if it is not stored. ``units`` is its share of work."""
        leaves, structure = pytree.tree_flatten(item)
        if not all(isinstance(leaf, Tensor | str) for leaf in leaves):
            return []
        # NotImplementedError: a container type that pytree cannot serialize.
        with contextlib.suppress(NotImplementedError), self._engine.tolerating_store_errors():
            results = [output_class.__name__, pytree.treespec_dumps(structure), *leaves]
            packed = pack(results, parts_of(key), cost_ms=self._pace.cost_ms(units))
            return self._engine.put({key: packed}, began)
        return []

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


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of parameters that can be given by position: a second one is not always the grids."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds)


def _tensors(call: dict[str, Any]) -> Item:
    return {name: value for name, value in call.items() if isinstance(value, Tensor)}


def _joined(items: list[Item]) -> Item:
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def _named(item: Item, *, but: str) -> list[Part]:
    return [(name, item[name]) for name in sorted(item) if name != but]


def _plain(value: Any) -> Part:
    return str(value) if isinstance(value, torch.dtype) else value
