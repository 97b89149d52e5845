"""Keeps encoder outputs under the content of the encoder's inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.runtime.engine import Engine
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.keys import Part, content_digest


class EncoderRunner:
    """Runs an encoder, or takes what it gave for the same bytes before. Reuse here is exact.

    Args:
        run: from the graph's inputs to its results.
        inputs: indices of the inputs whose content the results depend on.
        weights: indices of the weights that they depend on.
        engine: what it shares with the model's other graphs.
    """

    def __init__(
        self, run: Callable[..., Sequence[Any]], inputs: Sequence[int], weights: Sequence[int], engine: Engine
    ) -> None:
        self._run, self._inputs, self._weights, self._engine = run, tuple(inputs), tuple(weights), engine

    def __call__(self, args: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        """``(results, hit)`` for the graph's inputs."""
        key = self._key(args)
        stored = self._get(key)
        if stored is not None:
            self._engine.count("encoder_hits")
            return stored, True
        results = self._run(*args)
        self._engine.count("encoder_misses")
        self._put(key, results)
        return results, False

    def _key(self, args: Sequence[Any]) -> str:
        weights = self._engine.weights_fingerprint([args[index] for index in self._weights])
        content: list[Part] = [args[index] for index in self._inputs]
        return content_digest(["encoder", self._engine.options.salt, weights, tuple(content)])

    def _get(self, key: str) -> list[Any] | None:
        entry = None
        with self._engine.tolerating_store_errors():
            entry = self._engine.store.get(key)
        return None if entry is None else unpacked(entry)

    def _put(self, key: str, results: Sequence[Any]) -> None:
        with self._engine.tolerating_store_errors():
            self._engine.store.put(key, packed(results))


def packed(results: Sequence[Any]) -> Entry:
    """An entry for tensors and plain values.

    Raises:
        StoreError: a value is neither.
    """
    tensors = {str(index): value for index, value in enumerate(results) if isinstance(value, Tensor)}
    info = [_form(value) if isinstance(value, Tensor) else value for value in results]
    devices: dict[str, Json] = {name: str(tensor.device) for name, tensor in tensors.items()}
    return Entry(tensors, {"kind": "encoder", "results": info, "devices": devices})


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
        results.append(tensor.to(device, copy=True))  # a host tier may have moved it
    return results


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
