"""Baseline of a warm run: a lossless prefix hit with as many rows, under plain ``torch.compile``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import Workload
from vlcache_fx.integrations.transformers import OUTPUTS


class PrefixHitBaseline:
    """The last rows of the second request, with all other tokens in the KV cache.

    Args:
        compiled: the model under plain ``torch.compile``, after a run under ``torch.no_grad()``.
        workload: source of the request.
        rows: number of computed rows.
        new_cache: returns an empty cache for each run; None for dynamic caches.
    """

    def __init__(
        self, compiled: Any, workload: Workload, rows: int, new_cache: Callable[[], Any] | None = None
    ) -> None:
        self.rows = rows
        self._new_cache = new_cache
        self._compiled, self._num_tokens = compiled, workload.num_tokens
        cache = compiled(**workload.second).past_key_values
        self._past: list[tuple[Tensor, Tensor]] = [
            (layer.keys[:, :, :-rows].clone(), layer.values[:, :, :-rows].clone()) for layer in cache.layers
        ]
        given = {name: value for name, value in workload.second.items() if name != OUTPUTS}
        for name in given.keys() & {"input_ids", "position_ids"}:
            given[name] = given[name][..., -rows:]
        if "inputs_embeds" in given:
            given["inputs_embeds"] = given["inputs_embeds"][:, -rows:].clone()
        self._inputs: dict[str, Any] = given

    def prepare(self) -> None:
        """Fill a new cache: each run extends it."""
        from transformers import DynamicCache

        cache = DynamicCache() if self._new_cache is None else self._new_cache()
        for index, (keys, values) in enumerate(self._past):
            cache.update(keys, values, index)
        self._inputs["past_key_values"] = cache

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
