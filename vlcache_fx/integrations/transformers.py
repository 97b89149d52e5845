"""Hooks for models of the transformers library: encoders run before the compiled forward, and are cached.

Nothing here imports transformers. A model qualifies by what it offers:
``base_model.get_<modality>_features``, which ``generate()`` and ``forward`` call to run an encoder, and a
``forward`` that takes their outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlcache_fx.integrations.encoder_cache import PIXELS, EncoderCache
from vlcache_fx.integrations.frames import FrameCache
from vlcache_fx.integrations.items import concat_items
from vlcache_fx.runtime.engine import Engine

OUTPUTS = "mm_encoder_outputs"
"""The argument of ``forward`` that takes what encoders gave: modality -> output."""


def hook_placeholder_check(model: nn.Module) -> bool:
    """Keep the model's check of placeholders from fixing the number of features; True where hooked.

    ``get_placeholder_mask(input_ids, inputs_embeds, image_features=None, ...)`` puts their number into the
    text of an error, so every number of vision tokens would be compiled anew. The same comparison is made
    here, with a text of its own.
    """
    base = getattr(model, "base_model", model)
    original = getattr(base, "get_placeholder_mask", None)
    if original is None:
        return False
    optional = [
        name
        for name, parameter in inspect.signature(original).parameters.items()
        if name.endswith("_features") and parameter.default is None
    ]
    if not optional:
        return False

    @functools.wraps(original)
    def get_placeholder_mask(input_ids: Any, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = dict(zip(optional, args, strict=False))
        features |= {name: kwargs.pop(name) for name in optional if name in kwargs}
        masks = original(input_ids, inputs_embeds, **kwargs)
        for mask, name in zip(masks if isinstance(masks, tuple) else (masks,), optional, strict=False):
            given = features.get(name)
            if given is not None:
                placeholders = mask.expand(inputs_embeds.shape).sum()
                torch._check_tensor_all(  # type: ignore[no-untyped-call]
                    placeholders == given.numel(),
                    lambda: "placeholder tokens and encoder features do not agree in number",
                )
        return masks

    base.get_placeholder_mask = get_placeholder_mask
    return True


@contextlib.contextmanager
def hooked_placeholder_check(model: nn.Module) -> Iterator[None]:
    """``hook_placeholder_check`` for the body; the model is what it was behind it."""
    base: Any = getattr(model, "base_model", model)
    before = vars(base).get("get_placeholder_mask")
    hooked = before is None and hook_placeholder_check(model)
    try:
        yield
    finally:
        if hooked:
            del base.get_placeholder_mask


class EncodersFirst:
    """Runs a model's encoders before its ``forward``, as ``generate()`` does it.

    What encoders do with grids cannot be traced in one graph, and positions that depend on grids neither;
    the rest of ``forward`` can. Calls with gradients or without pixels are left as they are, and those onto a
    cache that holds tokens, where positions are more than a count.

    Args:
        model: its ``forward`` as it is now decides whether it takes encoders' outputs.

    Attributes:
        serves: whether it does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        parameters = list(inspect.signature(model.forward).parameters)
        self._names = parameters
        offered = all(callable(getattr(model, name, None)) for name in (PREPARE_ENCODERS, PREPARE_POSITIONS))
        self.is_supported = OUTPUTS in parameters and offered

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``forward`` with encoders' outputs in place of pixels."""
        return (args, kwargs) if torch.is_grad_enabled() else self.prepare(args, kwargs)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same in grad mode, too: for calls of which is known that no gradients are recorded."""
        if not self.is_supported:
            return args, kwargs
        given = dict(zip(self._names, args, strict=False)) | kwargs
        has_pixels = any(isinstance(given.get(pixels), Tensor) for pixels, _ in PIXELS.values())
        if not has_pixels or given.get(OUTPUTS) is not None or not isinstance(given.get("input_ids"), Tensor):
            return args, kwargs
        past = given.get("past_key_values")
        # Where positions are more than a count, those behind a cache are the model's own affair.
        if past is not None and past.get_seq_length() > 0 and self._has_own_positions():
            return args, kwargs
        known = {name: value for name, value in given.items() if value is not None}
        positions = self.positions(known)
        if positions is not None:
            known["position_ids"] = positions
        return (), getattr(self._model, PREPARE_ENCODERS)(known)

    def positions(self, given: dict[str, Any]) -> Tensor | None:
        """Positions of a call that brings none; None where they are a count of tokens."""
        if "position_ids" in given or not self._has_own_positions():
            return None
        found: Tensor = getattr(self._model, PREPARE_POSITIONS)(given["input_ids"], given)
        return found

    def _has_own_positions(self) -> bool:
        """True where positions are more than a count of tokens."""
        owners = [kind for kind in type(self._model).__mro__ if PREPARE_POSITIONS in vars(kind)]
        return bool(owners) and issubclass(owners[0], nn.Module)


PREPARE_ENCODERS = "_prepare_multimodal_encoder_kwargs_for_generation"
PREPARE_POSITIONS = "_prepare_position_ids_for_generation"
"""Methods of the library's models: keyword arguments in, encoders' outputs or positions out."""


def concat_encoder_outputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` with the features of each modality as one tensor, whatever number of items they come from.

    A list with a tensor per item is the first thing that models concatenate; inside the graph, every number
    of items would be compiled anew.
    """
    outputs = kwargs.get(OUTPUTS)
    if not isinstance(outputs, dict):
        return kwargs
    return {**kwargs, OUTPUTS: {name: concat_items(output) for name, output in outputs.items()}}


def restore_items(result: Any, kwargs: dict[str, Any]) -> None:
    """Undo ``concat_encoder_outputs(kwargs)`` in the features that ``result`` returns unchanged."""
    outputs = kwargs.get(OUTPUTS)
    for modality, output in outputs.items() if isinstance(outputs, dict) else ():
        name, features = f"{modality}_hidden_states", getattr(output, "pooler_output", None)
        if isinstance(getattr(result, name, None), tuple) and isinstance(features, list | tuple):
            setattr(result, name, features)


def hook_encoders(model: nn.Module, engine: Engine) -> list[str]:
    """Let ``model`` keep its encoder outputs in the engine's store; the modalities that were hooked."""
    base = getattr(model, "base_model", model)
    hooked = []
    for modality in PIXELS:
        name = f"get_{modality}_features"
        encode = getattr(base, name, None)
        if encode is None:
            continue
        encoder = FrameCache(EncoderCache(encode, base, modality, engine))
        untraced = torch.compiler.disable(encoder.__call__)  # type: ignore[no-untyped-call]
        setattr(base, name, functools.wraps(encode)(untraced))
        hooked.append(modality)
    return hooked
