"""Hooks for models of the transformers library: cached encoders run before the compiled forward.

Nothing here imports transformers. Supported are models with ``base_model.get_<modality>_features``, which
``generate()`` and ``forward`` call to run an encoder, and with a ``forward`` that takes encoder outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlcache_fx.compiling import with_globals
from vlcache_fx.integrations.encoder_cache import PIXELS, EncoderCache
from vlcache_fx.integrations.frames import FrameCache
from vlcache_fx.integrations.items import concat_items

if TYPE_CHECKING:
    from vlcache_fx.compiler.engine import Engine

ENCODER_NAME = re.compile("get_([a-z]+)_features")
"""Methods of the library's models that run an encoder."""

OUTPUTS = "mm_encoder_outputs"
"""The argument of ``forward`` for encoder outputs: modality -> output."""


def hook_placeholder_check(model: nn.Module) -> bool:
    """Replace the model's placeholder check, which specialises graphs; return whether it was replaced.

    ``get_placeholder_mask(input_ids, inputs_embeds, image_features, ...)`` formats the number of features
    into an error message, so each number of vision tokens would be compiled separately. The replacement
    makes the same comparison with a constant message.
    """
    base = getattr(model, "base_model", model)
    original = getattr(base, "get_placeholder_mask", None)
    if original is None:
        return False
    parameters = inspect.signature(original).parameters
    names = [name for name in parameters if name.endswith("_features")]
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    unchecked = _without_check(original) if required else original
    if not names or unchecked is None:
        return False

    @functools.wraps(original)
    def get_placeholder_mask(input_ids: Any, inputs_embeds: Tensor, *args: Any, **kwargs: Any) -> Any:
        features = dict(zip(names, args, strict=False))
        features |= {name: kwargs.pop(name) for name in names if name in kwargs}
        absent = {name: inputs_embeds.new_empty(0, 0) for name in required}
        masks = unchecked(input_ids, inputs_embeds, **absent, **kwargs)
        for mask, name in zip(masks if isinstance(masks, tuple) else (masks,), names, strict=False):
            encoded = features.get(name)
            if encoded is not None:
                placeholders = mask.expand(inputs_embeds.shape).sum()
                torch._check_tensor_all(  # type: ignore[no-untyped-call]
                    placeholders == encoded.numel(),
                    lambda: "placeholder tokens and encoder features do not agree in number",
                )
        return masks

    base.get_placeholder_mask = get_placeholder_mask
    return True


CHECK = "torch_compilable_check"
"""The function of transformers with which models compare numbers."""


def _without_check(method: Any) -> Any:
    """Return a bound method whose ``CHECK`` does nothing; None if it is no plain method that calls it."""
    function = getattr(method, "__func__", None)
    if not isinstance(function, FunctionType) or CHECK not in function.__code__.co_names:
        return None
    return MethodType(with_globals(function, {CHECK: _accept}), method.__self__)


def _accept(*_: Any, **__: Any) -> None:
    """Check nothing."""


@contextlib.contextmanager
def hooked_placeholder_check(model: nn.Module) -> Iterator[None]:
    """Apply ``hook_placeholder_check`` within the body; restore the model after it."""
    base: Any = getattr(model, "base_model", model)
    before = vars(base).get("get_placeholder_mask")
    hooked = before is None and hook_placeholder_check(model)
    try:
        yield
    finally:
        if hooked:
            del base.get_placeholder_mask


class EncodersFirst:
    """Runs a model's encoders before its ``forward``, like ``generate()``.

    Code that depends on grids, in encoders and in multimodal positions, cannot be traced into one graph; the
    rest of ``forward`` can. Calls with gradients or without pixels are not changed, nor are calls of models
    with multimodal positions on a non-empty KV cache.

    Args:
        model: the model; the signature of its current ``forward`` is inspected.

    Attributes:
        is_supported: whether ``forward`` takes encoder outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        parameters = inspect.signature(model.forward).parameters
        self._names = list(parameters)
        positional = (one for one in parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD)
        self._required = [one.name for one in positional if one.default is one.empty]
        offered = all(callable(getattr(model, name, None)) for name in (PREPARE_ENCODERS, PREPARE_POSITIONS))
        self.is_supported = OUTPUTS in parameters and offered

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of ``forward`` with encoder outputs instead of pixels; skip grad mode."""
        return (args, kwargs) if torch.is_grad_enabled() else self.prepare(args, kwargs)

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of ``forward`` with encoder outputs instead of pixels, in grad mode too."""
        if not self.is_supported:
            return args, kwargs
        given = dict(zip(self._names, args, strict=False)) | kwargs
        has_pixels = any(isinstance(given.get(pixels), Tensor) for pixels, _ in PIXELS.values())
        if not has_pixels or given.get(OUTPUTS) is not None or not isinstance(given.get("input_ids"), Tensor):
            return args, kwargs
        past = given.get("past_key_values")
        # The model computes multimodal positions after a non-empty cache itself.
        if past is not None and past.get_seq_length() > 0 and self._has_multimodal_positions():
            return args, kwargs
        inputs = {name: value for name, value in given.items() if value is not None}
        positions = self.positions(inputs)
        if positions is not None:
            inputs["position_ids"] = positions
        prepared = getattr(self._model, PREPARE_ENCODERS)(inputs)
        taken = {name: None for name in self._required if name in given}  # pixels without a default
        return (), taken | prepared

    def positions(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return multimodal positions for a call without positions; None if they only count tokens."""
        if "position_ids" in inputs or not self._has_multimodal_positions():
            return None
        positions: Tensor = getattr(self._model, PREPARE_POSITIONS)(inputs["input_ids"], inputs)
        return positions

    def _has_multimodal_positions(self) -> bool:
        """Return whether positions depend on more than the number of tokens."""
        owners = [kind for kind in type(self._model).__mro__ if PREPARE_POSITIONS in vars(kind)]
        return bool(owners) and issubclass(owners[0], nn.Module)


PREPARE_ENCODERS = "_prepare_multimodal_encoder_kwargs_for_generation"
PREPARE_POSITIONS = "_prepare_position_ids_for_generation"
"""Methods of the library's models: take keyword arguments, return encoder outputs or positions."""


def concat_encoder_outputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` with the features of each modality as one tensor (see ``concat_items``)."""
    outputs = kwargs.get(OUTPUTS)
    if not isinstance(outputs, dict):
        return kwargs
    return {**kwargs, OUTPUTS: {name: concat_items(output) for name, output in outputs.items()}}


def restore_items(result: Any, kwargs: dict[str, Any]) -> None:
    """Undo ``concat_encoder_outputs(kwargs)`` in the features that ``result`` returns unchanged."""
    outputs = kwargs.get(OUTPUTS)
    for modality, output in outputs.items() if isinstance(outputs, dict) else ():
        features = getattr(output, "pooler_output", None)
        if not isinstance(features, list | tuple):
            continue
        # From transformers 5.24 on, results have the encoder's whole output instead of the features.
        whole, name = f"{modality}_outputs", f"{modality}_hidden_states"
        if getattr(result, whole, None) is not None:
            setattr(result, whole, output)
        elif isinstance(getattr(result, name, None), tuple):
            setattr(result, name, features)


def hook_encoders(model: nn.Module, engine: Engine) -> list[str]:
    """Cache the model's encoder outputs in the engine's store; return the hooked modalities."""
    base = getattr(model, "base_model", model)
    hooked = [modality for modality in PIXELS if hasattr(base, f"get_{modality}_features")]
    for modality in hooked:
        _hook_encoder(base, modality, engine)
    return hooked


def hook_other_encoders(model: nn.Module, engine: Engine) -> list[str]:
    """Cache the outputs of encoders of other modalities, such as audio; return the newly hooked ones.

    ``forward`` runs these itself, so they split its graph. Where they can be traced, they need no hook.
    """
    base = getattr(model, "base_model", model)
    hooked = []
    for name in dir(type(base)):
        found = ENCODER_NAME.fullmatch(name)
        if found is None or found[1] in (*PIXELS, "text") or name in vars(base):
            continue
        parameters = [*inspect.signature(getattr(base, name)).parameters.values()]
        if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            _hook_encoder(base, found[1], engine)
            hooked.append(found[1])
    return hooked


def _hook_encoder(base: nn.Module, modality: str, engine: Engine) -> None:
    name = f"get_{modality}_features"
    encode = getattr(base, name)
    encoder = FrameCache(EncoderCache(encode, base, modality, engine))
    untraced = torch.compiler.disable(encoder.__call__)  # type: ignore[no-untyped-call]
    setattr(base, name, functools.wraps(encode)(untraced))
