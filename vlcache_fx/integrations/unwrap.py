"""Which model it is that a user hands over: wrappers around it are looked through, all else is refused."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from vlcache_fx.errors import CopyError, OptionError

_MODEL_METHODS = ("generate", "get_image_features", "get_video_features")
"""What a model of the transformers library offers, and layers do not."""


def unwrap_model(model: Any) -> nn.Module:
    """The model that does the work: ``model`` itself, or what it wraps.

    Adapters of PEFT and ``DistributedDataParallel`` hold a model and call it with what they are given. The
    model inside is what must be compiled: it is known by its methods, and ``generate()`` goes around the
    wrapper's ``forward``.

    Raises:
        OptionError: it is no module, or a module that is compiled or scripted already.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"a model (torch.nn.Module) can be compiled, not {_shown(model)}")
    found: nn.Module = model
    inner: nn.Module | None = model
    while inner is not None:
        _check(inner)
        found, inner = inner, _wrapped(inner)
    return found


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The model that a wrapper wraps; None where ``model`` is no wrapper."""
    base = getattr(type(model), "get_base_model", None)
    inner = base(model) if callable(base) else None
    if isinstance(inner, nn.Module) and inner is not model:
        return inner
    children = list(model.children())
    if len(children) != 1 or not _hands_on(model):
        return None
    (only,) = children
    is_model = isinstance(only, OptimizedModule) or any(
        callable(getattr(type(only), name, None)) for name in _MODEL_METHODS
    )
    return only if is_model or _wrapped(only) is not None else None


def _hands_on(model: nn.Module) -> bool:
    """True where ``forward`` takes anything, as one does that hands its arguments on."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    has_own = any(True for _ in model.parameters(recurse=False)) or any(
        True for _ in model.buffers(recurse=False)
    )
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds and not has_own


def _check(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError(f"a {name} is TorchScript, which cannot be compiled; pass the model it was made of")
    if isinstance(model, OptimizedModule):
        inside = type(model._orig_mod).__name__
        raise OptionError(f"this {inside} is compiled by torch.compile already; pass model._orig_mod")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise OptionError(f"this {name} is compiled by model.compile() already; pass one that is not")
    if hasattr(model.forward, "_torchdynamo_orig_callable"):
        raise OptionError(f"the forward of this {name} is compiled by torch.compile already; pass a model "
                          "whose forward is its own")  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def refuse_copies(model: nn.Module) -> None:
    """From now on, copying or pickling ``model``, or a module that holds it, is a ``CopyError``.

    Its methods are bound to it: in a copy, they would run the original.
    """
    name = type(model).__name__

    def refuse() -> Any:
        raise CopyError(
            f"this {name} is compiled by vlcache_fx, and a compiled model cannot be copied or pickled: do so "
            "before vlcache_fx.compile, or keep its weights (state_dict, save_pretrained)"
        )

    object.__setattr__(model, "__getstate__", refuse)
