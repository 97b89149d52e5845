"""The public functions ``compile`` and ``mark_spans``."""

import functools
import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vlcache_fx.backend import compile_graph
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explain import Arguments
from vlcache_fx.compiler.regions import uncompiled_refusal, untraced_refusal
from vlcache_fx.compiler.turns import Turns
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.errors import OptionError, VlcacheError
from vlcache_fx.explaining.collect import explain_call
from vlcache_fx.explaining.explanation import Explanation
from vlcache_fx.integrations.caches import order_dimensions
from vlcache_fx.integrations.recurrences import substitute_recurrences, takes_recurrences
from vlcache_fx.integrations.transformers import (
    EncodersFirst,
    concat_encoder_outputs,
    hook_encoders,
    hook_other_encoders,
    hook_placeholder_check,
    restore_items,
)
from vlcache_fx.integrations.unwrap import refuse_copies, unwrap_model
from vlcache_fx.options import Options
from vlcache_fx.passes.configured import configured
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients
from vlcache_fx.runtime.requests.marked_spans import mark_spans

__all__ = ["compile", "mark_spans"]

Model = TypeVar("Model", bound=nn.Module)


def compile(model: Model, **options: Any) -> Model:  # noqa: A001 - named after torch.compile
    """Compile ``model`` in place with the backend ``vlcache``, and cache its encoder outputs.

    ``forward`` is replaced, so ``generate()`` and every other caller of the model gets the compiled one.
    ``model.vlcache`` is the engine. Calls that record gradients run the original ``forward``.

    Of a wrapped model, such as a PEFT adapter, the inner model is compiled; the wrapper has ``vlcache`` too.
    The engine and its store are freed with the model. A compiled model can be saved, but neither copied nor
    pickled.

    Args:
        model: a vision-language model. Encoder outputs are cached for models of the transformers library.
        **options: see ``Options``.

    Returns:
        ``model``.

    Raises:
        OptionError: an option is unknown or has a bad value, or ``model`` is not a module or is compiled
            already.
    """
    parsed = Options.parse(options)
    inner = unwrap_model(model)
    if isinstance(vars(inner).get("vlcache"), Engine):
        raise OptionError(f"this {type(inner).__name__} is compiled already; its engine is model.vlcache")
    pipelines, engine = configured(parsed), Engine(parsed)
    engine.model = type(inner).__name__
    plain = inner.forward
    encoders_first = EncodersFirst(inner)
    turns = Turns(engine)
    compiled = torch.compile(plain, backend=_Backend(engine, turns), dynamic=parsed.dynamic)

    def prepared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        args, kwargs = encoders_first.prepare(args, kwargs)
        return args, concat_encoder_outputs(kwargs)

    def explanation(inputs: dict[str, Any]) -> Explanation:
        return explain_call(plain, inputs, prepared, engine, pipelines)

    def traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the compiled model; where Dynamo cannot trace it, without its encoders, or else unmodified."""
        before = engine.graph_calls
        try:
            result = turns.run(lambda: compiled(*args, **kwargs))
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, VlcacheError):
                raise failure.inner_exception from None  # with ``strict``: not Dynamo's wrapper
            raise
        except (TorchDynamoException, GuardOnDataDependentSymNode) as failure:
            if engine.graph_calls != before:  # a graph may have written to a cache
                raise
            if hook_other_encoders(inner, engine):
                return traced(args, kwargs)
            engine.ran_uncompiled(untraced_refusal(failure))
            return plain(*args, **kwargs)
        if engine.graph_calls == before:
            engine.ran_uncompiled(uncompiled_refusal())
        return result

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if records_gradients((*args, *kwargs.values()), inner):
            engine.bypass(gradient_refusal())
            return plain(*args, **kwargs)
        args, kwargs = encoders_first.prepare(args, kwargs)
        order_dimensions(kwargs.get("past_key_values"))
        with dynamo_settings(DYNAMO_CONFIG):
            result = traced(args, concat_encoder_outputs(kwargs))
        restore_items(result, kwargs)
        return result

    hook_encoders(inner, engine)
    hook_placeholder_check(inner)
    substitute_recurrences(inner)
    engine.explains(forward, explanation)
    object.__setattr__(inner, "forward", forward)
    for module in {id(module): module for module in (inner, getattr(inner, "base_model", inner))}.values():
        refuse_copies(module)
    for module in (inner, model):
        object.__setattr__(module, "vlcache", engine)
    return model


@takes_recurrences
class _Backend:
    """Dynamo backend of one model.

    Dynamo keeps a backend and its results as long as the code of ``forward`` exists. Both therefore refer to
    the engine weakly, so that its store can be freed; the engine owns the compiled graphs.
    """

    def __init__(self, engine: Engine, turns: Turns) -> None:
        self._engine, self._turns = weakref.ref(engine), weakref.ref(turns)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        engine = _alive(self._engine)
        turns = self._turns()
        assert turns is not None  # owned by ``forward``, like the engine
        turns.check()
        compiled, own = compile_graph(graph_module, example_inputs, engine), self._engine
        number = next(engine.graph_numbers)
        engine.graphs[number] = compiled

        def run(*args: Any) -> Sequence[Any]:
            return _alive(own).graphs[number](*args)

        weakref.finalize(run, _drop, own, number).atexit = False
        return run


def _alive(own: weakref.ref[Engine]) -> Engine:
    engine = own()
    assert engine is not None  # the model owns it, and the model is being called
    return engine


def _drop(own: weakref.ref[Engine], number: int) -> None:
    engine = own()
    if engine is not None:
        engine.graphs.pop(number, None)
