"""The public functions beside the backend."""

import functools
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from vlcache_fx.backend import compile_graph
from vlcache_fx.errors import NotReused, OptionError, VlcacheError
from vlcache_fx.integrations.transformers import (
    EncodersFirst,
    hook_encoders,
    hook_placeholder_check,
    joined_items,
    restore_items,
)
from vlcache_fx.options import Options
from vlcache_fx.runtime.engine import Engine
from vlcache_fx.runtime.marks import mark_spans
from vlcache_fx.runtime.report import Report

__all__ = ["compile", "mark_spans"]

Model = TypeVar("Model", bound=nn.Module)

DYNAMO_CONFIG = {
    # Models check on the way that placeholders and features agree; with scalars captured, that check does not
    # cut the graph in two.
    "capture_scalar_outputs": True,
    # Features that are added at masked places of inner layers have a size that depends on data.
    "capture_dynamic_output_shape_ops": True,
    # One forward serves prompts with and without images, and decoding steps, each static first and then
    # symbolic: more forms than Dynamo's default allows before it gives up compiling for good.
    "recompile_limit": 64,
}


def compile(model: Model, **options: Any) -> Model:  # noqa: A001 - named after torch.compile
    """Compile ``model`` for reuse: ``torch.compile(backend="vlcache")`` and an encoder cache.

    The model itself is changed (its ``forward`` is compiled, its encoders are cached) and returned, so that
    ``generate()`` and everything else that calls it benefits. ``model.vlcache`` is its engine.

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

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before = engine.graph_calls
        args, kwargs = encoders_first(args, kwargs)
        with torch._dynamo.config.patch(DYNAMO_CONFIG):
            try:
                result = compiled(*args, **joined_items(kwargs))
            except BackendCompilerFailed as failure:
                if isinstance(failure.inner_exception, VlcacheError):
                    raise failure.inner_exception from None  # strict: the typed refusal, not Dynamo's wrapper
                raise
        if engine.graph_calls == before:
            engine.report(
                Report(
                    "bypass",
                    "Dynamo ran this call uncompiled (has it reached recompile_limit?)",
                    reason_code=NotReused.UNCOMPILED,
                )
            )
        restore_items(result, kwargs)
        return result

    hook_encoders(model, engine)
    hook_placeholder_check(model)
    engine.explained = plain
    object.__setattr__(model, "forward", forward)
    object.__setattr__(model, "vlcache", engine)
    return model
