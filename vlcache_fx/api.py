"""The public functions beside the backend."""

import functools
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from vlcache_fx.backend import compile_graph
from vlcache_fx.capture.settings import DYNAMO_CONFIG
from vlcache_fx.errors import OptionError, VlcacheError
from vlcache_fx.explain import Arguments
from vlcache_fx.integrations.transformers import (
    EncodersFirst,
    hook_encoders,
    hook_placeholder_check,
    joined_items,
    restore_items,
)
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients
from vlcache_fx.runtime.marks import mark_spans
from vlcache_fx.runtime.regions import uncompiled_refusal

__all__ = ["DYNAMO_CONFIG", "compile", "mark_spans"]

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, **options: Any) -> Model:  # noqa: A001 - named after torch.compile
    """Compile ``model`` for reuse: ``torch.compile(backend="vlcache")`` and an encoder cache.

    The model itself is changed (its ``forward`` is compiled, its encoders are cached) and returned, so that
    ``generate()`` and everything else that calls it benefits. ``model.vlcache`` is its engine. Calls in which
    torch records gradients run the plain ``forward``.

    Args:
        model: a vision-language model; for models of the transformers library encoder outputs are cached too.
        **options: see ``Options``.

    Raises:
        OptionError: an option is unknown or has a bad value, or the model is compiled already.
    """
    parsed = Options.parse(options)
    if isinstance(getattr(model, "vlcache", None), Engine):
        raise OptionError(f"this {type(model).__name__} is compiled already; its engine is model.vlcache")
    engine = Engine(parsed)
    plain = model.forward
    encoders_first = EncodersFirst(model)
    compiled = torch.compile(
        plain, backend=functools.partial(compile_graph, engine=engine), dynamic=parsed.dynamic
    )

    def prepared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        args, kwargs = encoders_first.prepared(args, kwargs)
        return args, joined_items(kwargs)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if records_gradients((*args, *kwargs.values()), model):
            engine.bypass(gradient_refusal())
            return plain(*args, **kwargs)
        before = engine.graph_calls
        args, kwargs = encoders_first.prepared(args, kwargs)
        with torch._dynamo.config.patch(DYNAMO_CONFIG):
            try:
                result = compiled(*args, **joined_items(kwargs))
            except BackendCompilerFailed as failure:
                if isinstance(failure.inner_exception, VlcacheError):
                    raise failure.inner_exception from None  # strict: the typed refusal, not Dynamo's wrapper
                raise
        if engine.graph_calls == before:
            engine.ran_uncompiled(uncompiled_refusal())
        restore_items(result, kwargs)
        return result

    hook_encoders(model, engine)
    hook_placeholder_check(model)
    engine.explained, engine.prepared = plain, prepared
    object.__setattr__(model, "forward", forward)
    object.__setattr__(model, "vlcache", engine)
    return model
