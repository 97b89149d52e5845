"""Caches encoder outputs by the content of encoder inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.errors import UnreadableWeightsError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.entry_key import EntryKey, KeyScope
from vlcache_fx.keys.numerics import device_type_of, numerics
from vlcache_fx.runtime.in_flight import Missing
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.program import EncoderSpec
from vlcache_fx.store import Entry
from vlcache_fx.store.codec import pack, unpack


class EncoderRunner:
    """Runs an encoder, or returns its stored results for equal inputs. Reuse is exact.

    Args:
        run: computes the results from the graph's inputs.
        spec: inputs and weights on which results depend.
        engine: the state shared by the model's graphs.
    """

    def __init__(self, run: Callable[..., Sequence[Any]], spec: EncoderSpec, engine: ServingState) -> None:
        self._run, self._spec, self._engine = run, spec, engine
        self._pace = Pace()

    def __call__(self, args: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        """Return ``(results, hit)`` for the graph's inputs. Waits for a request that computes the same."""
        with self._engine.stage("encoder"):
            return self._results(args)

    def _results(self, args: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        engine, began = self._engine, self._engine.clears.number
        try:
            keys = self._keys(args)
        except UnreadableWeightsError as error:
            engine.refuse_weights(error)
            return self._run(*args), False
        units = sum(args[index].numel() for index in self._spec.inputs if isinstance(args[index], Tensor))

        def missing(found: list[Any] | None) -> Missing:
            return Missing() if found is not None else engine.missing(keys, self._pace.seconds(units))

        stored, claim = engine.find_or_claim(lambda _: self._get(keys), missing)
        with claim:
            if stored is not None:
                engine.count("encoder_hits")
                return stored, True
            with engine.timing(self._pace, units):
                results = self._run(*args)
            engine.count("encoder_misses")
            stored_keys: list[str] = []
            with engine.tolerating_store_errors():
                cost_ms = self._pace.cost_ms(units, share=1 / len(keys))
                packed: dict[str, Entry] = {
                    key: pack([result], key.parts, cost_ms=cost_ms)
                    for key, result in zip(keys, results, strict=True)
                }
                stored_keys = engine.put(packed, began)
            claim.end(stored_keys)
        return results, False

    def _keys(self, args: Sequence[Any]) -> list[EntryKey]:
        weights = self._engine.fingerprints.of([args[index] for index in self._spec.weights])
        content: list[Part] = [args[index] for index in self._spec.inputs]
        scope = KeyScope(self._engine.key_salt, weights)
        parts = {"content": content_digest(content), "numerics": numerics(device_type_of(args))}
        return [
            scope.key("features", {**parts, "computation": computation})
            for computation in self._spec.computations
        ]

    def _get(self, keys: Sequence[str]) -> list[Any] | None:
        """Return all results, or None if any is missing."""
        found: list[Any] = []
        with self._engine.tolerating_store_errors():
            for key in keys:
                entry = self._engine.store.get(key)
                result = None if entry is None else unpack(entry)
                if result is None:
                    return None
                found += result
            return found
        return None
