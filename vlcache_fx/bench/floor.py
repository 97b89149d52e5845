"""What a warm run is held against: a lossless prefix hit that computes as many rows, plainly compiled."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.workload import Workload
from vlcache_fx.integrations.transformers import OUTPUTS


class Floor:
    """The last rows of the second request, behind a key-value cache that holds all other tokens.

    Args:
        compiled: the plainly compiled model; must have been run under ``torch.no_grad()``.
        workload: whose second request it is.
        rows: how many are computed.
        new_cache: gives an empty cache for each run; None makes a dynamic one.
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
        """A cache of its own for the next run, which grows it."""
        from transformers import DynamicCache

        cache = DynamicCache() if self._new_cache is None else self._new_cache()
        for index, (keys, values) in enumerate(self._past):
            cache.update(keys, values, index)
        self._inputs["past_key_values"] = cache

    def run(self) -> Any:
        """The rows alone."""
        return self._compiled(**self._inputs)

    def check(self) -> None:
        """The cache must hold all tokens now.

        Raises:
            MeasurementError: it does not, so something else was computed.
        """
        held = self._inputs["past_key_values"].get_seq_length()
        if held != self._num_tokens:
            raise MeasurementError(f"the prefix hit left {held} of {self._num_tokens} tokens in the cache")
