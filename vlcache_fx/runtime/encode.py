"""Keeps encoder outputs under the content of the encoder's inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.errors import UnreadableWeightsError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.digest_cache import known_rows, remember, rows_digests
from vlcache_fx.keys.numerics import device_type_of, numerics
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.program import EncoderSpec
from vlcache_fx.store.entry import Entry, Json


class EncoderRunner:
    """Runs an encoder, or takes what it gave for the same bytes before. Reuse here is exact.

    Args:
        run: from the graph's inputs to its results.
        spec: what the results depend on.
        engine: what it shares with the model's other graphs.
    """

    def __init__(self, run: Callable[..., Sequence[Any]], spec: EncoderSpec, engine: ServingState) -> None:
        self._run, self._spec, self._engine = run, spec, engine

    def __call__(self, args: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        """``(results, hit)`` for the graph's inputs."""
        try:
            keys = self._keys(args)
        except UnreadableWeightsError as error:
            self._engine.refuse_weights(error)
            return self._run(*args), False
        stored = self._get(keys)
        if stored is not None:
            self._engine.count("encoder_hits")
            return stored, True
        results = self._run(*args)
        self._engine.count("encoder_misses")
        with self._engine.tolerating_store_errors():
            for key, result in zip(keys, results, strict=True):
                self._engine.store.put(key, packed([result]))
        return results, False

    def _keys(self, args: Sequence[Any]) -> list[str]:
        weights = self._engine.fingerprints.of([args[index] for index in self._spec.weights])
        content: list[Part] = [args[index] for index in self._spec.inputs]
        state = numerics(device_type_of(args))
        inputs = content_digest(["encoder", self._engine.options.key_salt, weights, state, tuple(content)])
        return [content_digest([inputs, computation]) for computation in self._spec.computations]

    def _get(self, keys: Sequence[str]) -> list[Any] | None:
        """All results, or None where one is missing."""
        found: list[Any] = []
        with self._engine.tolerating_store_errors():
            for key in keys:
                entry = self._engine.store.get(key)
                result = None if entry is None else unpacked(entry)
                if result is None:
                    return None
                found += result
            return found
        return None


def packed(results: Sequence[Any]) -> Entry:
    """An entry for tensors and plain values; digests of the tensors are remembered with them.

    Raises:
        StoreError: a value is neither.
    """
    tensors = {str(index): value for index, value in enumerate(results) if isinstance(value, Tensor)}
    info = [_form(value) if isinstance(value, Tensor) else value for value in results]
    devices: dict[str, Json] = {name: str(tensor.device) for name, tensor in tensors.items()}
    entry = Entry(tensors, {"kind": "encoder", "results": info, "devices": devices})
    for name, tensor in tensors.items():
        if tensor.dim() > 0:
            remember(tensor)
            rows_digests(tensor, [(0, tensor.shape[0])])
            remember(entry.tensors[name], known_rows(tensor))
    return entry


def unpacked(entry: Entry) -> list[Any] | None:
    """What was packed, as copies where it was (a caller may write to them; it is little beside an encoder).

    None for an entry that is damaged or of another kind.
    """
    info, devices = entry.info.get("results"), entry.info.get("devices")
    if not isinstance(info, list) or not isinstance(devices, dict):
        return None
    results: list[Any] = []
    for index, value in enumerate(info):
        if not isinstance(value, dict):
            results.append(value)
            continue
        tensor, device = entry.tensors.get(str(index)), devices.get(str(index))
        if tensor is None or _form(tensor) != value or not isinstance(device, str):
            return None
        copied = tensor.to(device, copy=True)  # a host tier may have moved it
        if copied.device == tensor.device and known_rows(tensor):
            remember(copied, known_rows(tensor))
        results.append(copied)
    return results


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
