"""Lets Dynamo trace linear recurrences of models as ``torch.ops.vlcache.recur``, one node each.

Models of transformers write recurrences as Python loops over chunks of tokens. Dynamo unrolls them, so each
length has a graph of its own. ``torch.compiler.substitute_in_graph`` makes Dynamo trace another function in
the place of one. It changes nothing outside traces, and in those of other backends, substitutes run the
original code.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlcache_fx.integrations.recurrence_functions import delta_rule, delta_rule_of_rows, state_space_scan

__all__ = ["substitute_recurrences", "takes_recurrences", "trace_again"]

Backend = TypeVar("Backend", bound=Callable[..., Any])

KERNELS: Mapping[str, Callable[..., Any]] = {
    "chunk_gated_delta_rule": delta_rule,
    "chunk_kda": delta_rule,
    "fused_recurrent_gated_delta_rule": delta_rule_of_rows,
    "fused_recurrent_kda": delta_rule_of_rows,
    "recurrent_gated_delta_rule": delta_rule_of_rows,
    "mamba_chunk_scan_combined": state_space_scan,
}
"""Name of a kernel in ``fla`` or ``mamba_ssm`` -> its substitute."""

FAMILIES = ("transformers.models.", "transformers_modules.", "fla.ops.", "mamba_ssm.ops.")
"""Modules that may define recurrences; ``transformers_modules`` are models with code of their own."""

SHORT_NAMES = {"q": "query", "k": "key", "v": "value", "x": "hidden_states"}
"""Argument of the kernels -> of transformers' functions, and of the substitutes."""

CHECKED = ("cu_seqlens", "seq_idx")
"""Arguments that transformers' decorator refuses, where it drops others that its function does not take."""

_MARK = "takes_recurrences"


def takes_recurrences(backend: Backend) -> Backend:
    """Mark a Dynamo backend whose graphs get the operator; for use as a decorator."""
    setattr(backend, _MARK, True)
    return backend


def substitute_recurrences(model: nn.Module | None = None) -> list[FunctionType]:
    """Register substitutes with Dynamo, for the traces of backends that ``takes_recurrences`` marks.

    Functions that have a substitute keep it, so calls may be repeated. Nothing else than traces changes.

    Args:
        model: look in the Python modules of its layers, too; by default only in those of transformers and of
            the libraries of kernels, as far as they are imported.

    Returns:
        The functions that had no substitute before.
    """
    own = () if model is None else {type(layer).__module__ for layer in model.modules()}
    modules = [
        module for name, module in list(sys.modules.items()) if name in own or name.startswith(FAMILIES)
    ]
    _register(compiles_recurrences, _never, can_constant_fold_through=True)
    return [
        function
        for function, computes in _recurrences(modules)
        if _register(function, _substitute(function, computes))
    ]


def trace_again(functions: Iterable[FunctionType]) -> None:
    """Let Dynamo start over if it has traced one of ``functions``; for backends, while they compile.

    So graphs get the operator although the model's module was imported after torch had loaded the backend.
    Without effect in versions of torch that cannot start over: there, only later graphs get it.

    Raises:
        TorchDynamoException: Dynamo answers it by tracing again.
    """
    from torch._dynamo import exc, utils

    traced = set(utils.get_traced_code() or ())
    clears, passes = (
        getattr(exc, name, None) for name in ("UnspecializeRestartAnalysis", "TensorifyScalarRestartAnalysis")
    )
    if clears is None or passes is None or traced.isdisjoint(map(_code, functions)):
        return
    # Dynamo takes only the one from a backend, and only for the other does it forget where it was before.
    raise type("_StartOver", (passes, clears), {})(restart_reason="a recurrence has a substitute now")


def compiles_recurrences() -> bool:
    """Return True while Dynamo traces for a backend that ``takes_recurrences`` marks.

    Dynamo runs this function instead of tracing it, and takes the result as a constant. That needs no guard:
    Dynamo keeps what it compiled for each backend apart.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None:
        if getattr(backend, _MARK, False):
            return True
        # Wrappers of torch: for debugging, and for options.
        backend = getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "compiler_fn", None))
    return False


def _never() -> bool:
    return False


def _register(function: Callable[..., Any], substitute: Callable[..., Any], **options: bool) -> bool:
    """Register ``substitute`` with Dynamo; return False if ``function`` has a substitute already."""
    register = torch.compiler.substitute_in_graph(function, skip_signature_check=True, **options)
    try:
        register(substitute)
    except ValueError:  # torch's answer to a second substitute
        return False
    return True


def _recurrences(modules: Iterable[ModuleType]) -> Iterator[tuple[FunctionType, Callable[..., Any]]]:
    """Yield the functions in ``modules`` that compute a kernel's recurrence, and what computes it here."""
    for module in modules:
        for value in list(vars(module).values()):
            function = _function(value)
            if function is not None:
                computes = KERNELS.get(_kernel_name(function))
                if computes is not None and _required(computes) <= set(_parameters(function)):
                    yield function, computes


def _function(value: Any) -> FunctionType | None:
    """Return ``value``, a global of a module, if it is a function; ``kernels`` makes modules of functions."""
    if isinstance(value, nn.Module) and hasattr(type(value), "kernel_layer_name"):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    return value if isinstance(value, FunctionType) else None


def _kernel_name(function: FunctionType) -> str:
    """Return the name of the kernel that ``function`` calls, or computes in torch."""
    return _decorated(function).get("func_name") or function.__name__.removeprefix("torch_")


def _decorated(function: FunctionType) -> dict[str, Any]:
    """Return the variables of the decorator that calls a kernel or torch code, if ``function`` has it."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    if "func_name" not in names and "implementation" not in names:
        return {}
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _code(function: FunctionType) -> CodeType:
    """Return the code of ``function``, or of what its decorator calls: decorated functions share theirs."""
    code: CodeType = _decorated(function).get("implementation", function).__code__
    return code


def _parameters(function: FunctionType) -> tuple[str, ...]:
    """Return the names of the parameters of ``function``, or of what its decorator calls."""
    parameters = inspect.signature(_decorated(function).get("implementation", function)).parameters
    return tuple(SHORT_NAMES.get(name, name) for name in parameters)


def _required(computes: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(computes).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def _substitute(function: FunctionType, computes: Callable[..., Any]) -> Callable[..., Any]:
    """Return what Dynamo traces in the place of ``function``."""
    # A copy, because Dynamo replaces ``function`` itself wherever it is called.
    original = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    original.__kwdefaults__ = function.__kwdefaults__
    vars(original).update(vars(function))
    names = _parameters(function)
    drops_others = bool(_decorated(function))

    def substitute(*args: Any, **kwargs: Any) -> Any:
        if compiles_recurrences() and not _records_gradients((*args, *kwargs.values())):
            given = dict(zip(names, args, strict=False))
            for name, value in kwargs.items():
                if not drops_others or name in names or name in CHECKED:
                    given[SHORT_NAMES.get(name, name)] = value
            result = computes(**given)
            if result is not None:
                return result
        return original(*args, **kwargs)

    return substitute


def _records_gradients(values: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in values
    )
