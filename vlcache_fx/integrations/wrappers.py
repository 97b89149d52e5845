"""Models of the transformers library as modules with only tensors as arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.items import concat_items, feature_fields
from vlcache_fx.integrations.transformers import OUTPUTS


class Prefill(nn.Module):
    """Token ids and features -> logits of the last token, then keys and values per layer.

    Args:
        model: the model.
        text: names of the first inputs.
        kinds: per modality, the class of the encoder output.
        structure: pytree structure of the encoder outputs' fields, whose leaves are the remaining inputs.
    """

    def __init__(
        self, model: nn.Module, text: Sequence[str], kinds: Mapping[str, type], structure: TreeSpec
    ) -> None:
        super().__init__()
        self.model, self._text, self._kinds, self._structure = model, tuple(text), kinds, structure

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self._text, inputs, strict=False))
        fields = pytree.tree_unflatten(inputs[len(self._text) :], self._structure)
        given[OUTPUTS] = {name: kind(**fields[name]) for name, kind in self._kinds.items()}
        return _flat(self.model(**given, use_cache=True, logits_to_keep=1))


class Decode(nn.Module):
    """One token, its position and the cache -> logits, then the cache including the token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        return _flat(
            self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=DynamicCache(pairs),
                use_cache=True,
                logits_to_keep=1,
            )
        )


class Encoder(nn.Module):
    """Pixels of one item -> features; grids (``fixed``) are constants of the graph."""

    def __init__(
        self, encode: Callable[..., Any], owner: nn.Module, pixels: str, fixed: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.owner, self._encode, self._pixels, self._fixed = owner, encode, pixels, fixed

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        output = self._encode(**{self._pixels: pixels}, **self._fixed)
        return tuple(pytree.tree_leaves(feature_fields(concat_items(output)) or {}))


def _flat(result: Any) -> tuple[Tensor, ...]:
    layers = result.past_key_values.layers
    if not all(isinstance(getattr(layer, "keys", None), Tensor) for layer in layers):
        raise ExportError("this model's cache does not consist of keys and values per layer")
    return (result.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))
