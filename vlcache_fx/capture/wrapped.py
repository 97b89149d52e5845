"""Wrapper subclasses as weights: graphs take their inner tensors instead.

A quantised or sharded tensor is a subclass that lists its inner tensors (``__tensor_flatten__``). A graph
that builds the wrapper from them contains plain operators alone, and can be analysed, rewritten and lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlcache_fx.errors import Reason, UnreadableWeightsError, UnsupportedGraphError
from vlcache_fx.keys.inner_tensors import leaves_of

WHOLE = "whole"
"""Key in the ``meta`` of an inner tensor's placeholder: the wrapper, an input of the traced code."""


@dataclass(frozen=True)
class _WrapperSpec:
    """Structure of a wrapper tensor.

    Attributes:
        kind: its class.
        parts: name and spec of each inner tensor; the spec is None for a plain tensor.
        context: second result of ``__tensor_flatten__``.
        sizes, strides: of the wrapper.
    """

    kind: Any
    parts: tuple[tuple[str, _WrapperSpec | None], ...]
    context: Any
    sizes: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _WrapperSpec | None:
        """Return the spec of a tensor; None for a plain tensor."""
        if not is_traceable_wrapper_subclass(tensor):
            return None
        names, context = tensor.__tensor_flatten__()
        parts = tuple((name, cls.of(getattr(tensor, name))) for name in names)
        return cls(type(tensor), parts, context, tensor.shape, tensor.stride())

    def flat(self, tensor: Tensor) -> list[Tensor]:
        """Return the plain tensors in ``tensor``, which has this spec."""
        found: list[Tensor] = []
        for name, spec in self.parts:
            inner = getattr(tensor, name)
            found += [inner] if spec is None else spec.flat(inner)
        return found

    def whole(self, tensors: list[Tensor]) -> Any:
        """Pop the inner tensors from the front of ``tensors``; return the wrapper of them."""
        inner = {name: tensors.pop(0) if spec is None else spec.whole(tensors) for name, spec in self.parts}
        return self.kind.__tensor_unflatten__(inner, self.context, self.sizes, self.strides)


class Unwrapped:
    """A graph on plain tensors, and the conversion of inputs.

    Attributes:
        graph_module: takes ``flat(inputs)``.
        example_inputs: its example inputs.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        specs: Sequence[_WrapperSpec | None],
    ) -> None:
        self.graph_module, self.example_inputs = graph_module, example_inputs
        self._specs = tuple(specs)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Unwrapped | None:
        """Return a copy of the graph on inner tensors; None if all inputs are plain.

        Raises:
            UnsupportedGraphError: WEIGHTS_UNREADABLE, see ``check_inputs``; CAPTURE_FAILED, a wrapper has
                dynamic sizes or was traced as another type.
        """
        check_inputs(example_inputs)
        specs = [_WrapperSpec.of(value) if isinstance(value, Tensor) else None for value in example_inputs]
        if not any(specs):
            return None
        graph, copied = fx.Graph(), {}
        inputs: list[Any] = []
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        wholes: list[tuple[fx.Node, _WrapperSpec, list[fx.Node]]] = []
        for node, value, spec in zip(placeholders, example_inputs, specs, strict=True):
            if spec is None:
                copied[node] = graph.node_copy(node)
                inputs.append(value)
                continue
            fake = node.meta.get("example_value", node.meta.get("val"))
            parts = spec.flat(value)
            fakes = _fake_parts(fake, spec)
            inner_nodes = []
            for index, part in enumerate(parts):
                inner = graph.placeholder(f"{node.name}_{index}")
                inner.meta = {**node.meta, WHOLE: value, "example_value": fakes[index]}
                inner.meta.pop("val", None)
                inner_nodes.append(inner)
                inputs.append(part)
            wholes.append((node, spec, inner_nodes))
        for node, spec, inner_nodes in wholes:
            copied[node] = graph.call_function(_maker(spec), tuple(inner_nodes))
        graph.output(graph.graph_copy(graph_module.graph, copied))
        return cls(fx.GraphModule(graph_module, graph), inputs, specs)

    @property
    def classes(self) -> str:
        """Names of the unwrapped classes."""
        return ", ".join(sorted({spec.kind.__name__ for spec in self._specs if spec is not None}))

    def flat(self, args: Sequence[Any]) -> list[Any]:
        """Return the inputs of ``graph_module`` for those of the original graph."""
        found: list[Any] = []
        for value, spec in zip(args, self._specs, strict=True):
            found += [value] if spec is None else spec.flat(value)
        return found

    def whole(self, flat: Sequence[Any]) -> list[Any]:
        """Return the inputs of the original graph for those of ``graph_module``."""
        rest = list(flat)
        return [rest.pop(0) if spec is None else spec.whole(rest) for spec in self._specs]


def check_inputs(example_inputs: Sequence[Any]) -> None:
    """Refuse inputs whose bytes keys cannot cover: packed weights, and subclasses without inner tensors.

    Raises:
        UnsupportedGraphError: WEIGHTS_UNREADABLE.
    """
    for value in example_inputs:
        if isinstance(value, torch.ScriptObject):
            detail = "weights are packed by a kernel library that does not expose their bytes"
            raise UnsupportedGraphError(Reason.WEIGHTS_UNREADABLE, detail)
        if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value):
            _check_dispatch(value)


def _check_dispatch(tensor: Tensor) -> None:
    if type(tensor).__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl:
        return
    try:
        leaves_of([tensor])
    except UnreadableWeightsError as error:
        raise UnsupportedGraphError(Reason.WEIGHTS_UNREADABLE, str(error)) from error


def _fake_parts(fake: Any, spec: _WrapperSpec) -> list[Any]:
    if not isinstance(fake, Tensor) or _names(_WrapperSpec.of(fake)) != _names(spec):
        detail = f"an input of type {spec.kind.__name__} was traced as another type"
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, detail)
    if any(not isinstance(size, int) for size in fake.shape):
        detail = f"an input of type {spec.kind.__name__} has dynamic sizes"
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, detail)
    return spec.flat(fake)


def _names(spec: _WrapperSpec | None) -> Any:
    return None if spec is None else [(name, _names(inner)) for name, inner in spec.parts]


def _maker(spec: _WrapperSpec) -> Any:
    def whole(*tensors: Tensor) -> Any:
        return spec.whole(list(tensors))

    return whole
