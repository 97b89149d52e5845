"""Baseline of a warm run: a lossless prefix hit with as many rows, under plain ``torch.compile``."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import Workload, merged_embeddings
from vlcache_fx.integrations.transformers import OUTPUTS


class PrefixHitBaseline:
    """The last rows of the second request, with all other tokens in the KV cache.

    The cache of a hybrid decoder also holds the states of recurrent layers behind these tokens: there, the
    unmodified ``model`` computes the tokens first.

    Args:
        compiled: the model under plain ``torch.compile``, after a run under ``torch.no_grad()``.
        workload: source of the request.
        rows: number of computed rows.
        new_cache: returns an empty cache for each run; None for dynamic caches.
        model: the unmodified model; needed where layers are recurrent.
    """

    def __init__(
        self,
        compiled: Any,
        workload: Workload,
        rows: int,
        new_cache: Callable[[], Any] | None = None,
        model: Any = None,
    ) -> None:
        self.rows = rows
        self._compiled, self._num_tokens = compiled, workload.num_tokens
        if model is not None and _has_states(model):
            self._make_cache = _copies(_prefix_cache(model, workload, rows), new_cache)
        else:
            cache = compiled(**workload.second).past_key_values
            past = [(layer.keys[:, :, :-rows], layer.values[:, :, :-rows]) for layer in cache.layers]
            self._make_cache = _filled([(keys.clone(), values.clone()) for keys, values in past], new_cache)
        given = {name: value for name, value in workload.second.items() if name != OUTPUTS}
        for name in given.keys() & {"input_ids", "position_ids"}:
            given[name] = given[name][..., -rows:]
        if "inputs_embeds" in given:
            given["inputs_embeds"] = given["inputs_embeds"][:, -rows:].clone()
        self._inputs: dict[str, Any] = given

    def prepare(self) -> None:
        """Fill a new cache: each run extends it."""
        self._inputs["past_key_values"] = self._make_cache()

    def run(self) -> Any:
        """Compute the rows."""
        return self._compiled(**self._inputs)

    def check(self) -> None:
        """Check that the cache contains all tokens.

        Raises:
            MeasurementError: it contains another number of tokens.
        """
        length = self._inputs["past_key_values"].get_seq_length()
        if length != self._num_tokens:
            raise MeasurementError(f"the prefix hit left {length} of {self._num_tokens} tokens in the cache")


def _has_states(model: Any) -> bool:
    """Return whether layers of the model's cache have states of convolutions and recurrences."""
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config).layers
    return any(hasattr(layer, "conv_states") for layer in layers)


def _filled(past: list[tuple[Tensor, Tensor]], new_cache: Callable[[], Any] | None) -> Callable[[], Any]:
    """Return a function that returns a cache with these keys and values."""

    def make() -> Any:
        from transformers import DynamicCache

        cache = DynamicCache() if new_cache is None else new_cache()
        for index, (keys, values) in enumerate(past):
            cache.update(keys, values, index)
        return cache

    return make


def _copies(cache: Any, new_cache: Callable[[], Any] | None) -> Callable[[], Any]:
    """Return a function that returns copies of a cache of any kinds of layers.

    Raises:
        MeasurementError: the cache is to be another one.
    """
    if new_cache is not None:
        raise MeasurementError("a prefix hit of recurrent layers is measured with a dynamic cache only")

    def make() -> Any:
        made = copy.copy(cache)
        made.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in made.layers:
            vars(layer).update({name: _cloned(value) for name, value in vars(layer).items()})
        return made

    return make


def _cloned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cloned(part) for name, part in value.items()}
    # A clone is not marked as a static address, which compiled code would be specialised on.
    return value.clone() if isinstance(value, Tensor) else value


def _prefix_cache(model: Any, workload: Workload, rows: int) -> Any:
    """Return the cache behind all tokens of the second request but the last rows."""
    given = {name: value for name, value in workload.second.items() if name not in (OUTPUTS, "input_ids")}
    given["inputs_embeds"] = merged_embeddings(model, workload.second)[:, :-rows]
    if "position_ids" in given:
        given["position_ids"] = given["position_ids"][..., :-rows]
    return model(**given).past_key_values
