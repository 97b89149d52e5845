"""Checks of the user's model: unwraps PEFT and DDP wrappers, rejects models that cannot be compiled."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from vlcache_fx.errors import CopyError, OptionError

_MODEL_METHODS = ("generate", "get_image_features", "get_video_features")
"""Methods of models of the transformers library that layers do not have."""


def unwrap_model(model: Any) -> nn.Module:
    """Return ``model``, or the innermost model within its wrappers.

    PEFT's adapters and ``DistributedDataParallel`` pass their arguments on to a model. The inner model must
    be compiled, because ``generate()`` bypasses the wrapper's ``forward``.

    Raises:
        OptionError: ``model`` is not a module, or is compiled or scripted already.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"only a model (torch.nn.Module) can be compiled, not {_shown(model)}")
    innermost: nn.Module = model
    inner: nn.Module | None = model
    while inner is not None:
        _check(inner)
        innermost, inner = inner, _wrapped(inner)
    return innermost


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the model inside a wrapper, or None if ``model`` is not a wrapper."""
    base = getattr(type(model), "get_base_model", None)
    inner = base(model) if callable(base) else None
    if isinstance(inner, nn.Module) and inner is not model:
        return inner
    children = list(model.children())
    if len(children) != 1 or not _forwards_arguments(model):
        return None
    (only,) = children
    is_model = isinstance(only, OptimizedModule) or any(
        callable(getattr(type(only), name, None)) for name in _MODEL_METHODS
    )
    return only if is_model or _wrapped(only) is not None else None


def _forwards_arguments(model: nn.Module) -> bool:
    """Return whether ``forward`` takes ``*args, **kwargs`` and the module has no tensors of its own."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    has_tensors = any(True for _ in model.parameters(recurse=False)) or any(
        True for _ in model.buffers(recurse=False)
    )
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds and not has_tensors


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(f"a {name} is TorchScript, which cannot be compiled; pass the original model")
    if isinstance(model, OptimizedModule):
        original = type(model._orig_mod).__name__
        raise OptionError(f"this {original} is compiled by torch.compile already; pass model._orig_mod")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise OptionError(f"this {name} is compiled by model.compile() already; pass the original model")
    if hasattr(model.forward, "_torchdynamo_orig_callable"):
        raise OptionError(f"the forward of this {name} is compiled by torch.compile already; pass a model "
                          "with its own forward")  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def refuse_copies(model: nn.Module) -> None:
    """Make copying or pickling ``model``, or a module that contains it, raise ``CopyError``.

    Its replaced methods are bound to it: in a copy, they would run the original.
    """
    name = type(model).__name__

    def refuse() -> Any:
        raise CopyError(
            f"this {name} is compiled by vlcache_fx, and a compiled model cannot be copied or pickled: do so "
            "before vlcache_fx.compile, or save its weights (state_dict, save_pretrained)"
        )

    object.__setattr__(model, "__getstate__", refuse)
