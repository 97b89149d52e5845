"""Weights that are made of other tensors: graphs take these instead.

A quantised or sharded tensor is a class of its own that says which tensors it is made of
(``__tensor_flatten__``). A graph in which the whole is put together from them holds plain operators alone, so
it can be analysed, rewritten and lowered like any other.
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
"""In a placeholder's ``meta``: the input of the traced code that the placeholder is a part of."""


@dataclass(frozen=True)
class _Form:
    """How a tensor is made of others.

    Attributes:
        kind: its class.
        parts: per inner tensor, its name and its own form; None for a plain one.
        context: what the class says beside them.
        sizes, strides: of the whole.
    """

    kind: Any
    parts: tuple[tuple[str, _Form | None], ...]
    context: Any
    sizes: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Form | None:
        """None for a plain tensor."""
        if not is_traceable_wrapper_subclass(tensor):
            return None
        names, context = tensor.__tensor_flatten__()
        parts = tuple((name, cls.of(getattr(tensor, name))) for name in names)
        return cls(type(tensor), parts, context, tensor.shape, tensor.stride())

    def flat(self, tensor: Tensor) -> list[Tensor]:
        """The plain tensors that ``tensor``, of this form, is made of."""
        found: list[Tensor] = []
        for name, form in self.parts:
            inner = getattr(tensor, name)
            found += [inner] if form is None else form.flat(inner)
        return found

    def whole(self, tensors: list[Tensor]) -> Any:
        """The tensor of this form that is made of the first of ``tensors``, which are taken off."""
        inner = {name: tensors.pop(0) if form is None else form.whole(tensors) for name, form in self.parts}
        return self.kind.__tensor_unflatten__(inner, self.context, self.sizes, self.strides)


class Unwrapped:
    """A graph whose inputs are plain tensors, and what there is to know to call it.

    Attributes:
        graph_module: takes ``flat(inputs)``.
        example_inputs: the flat ones.
    """

    def __init__(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], forms: Sequence[_Form | None]
    ) -> None:
        self.graph_module, self.example_inputs = graph_module, example_inputs
        self._forms = tuple(forms)

    @classmethod
    def of(cls, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Unwrapped | None:
        """None where all inputs are plain. ``graph_module`` is left as it is.

        Raises:
            UnsupportedGraphError: an input does not say of which tensors it is made.
        """
        check_inputs(example_inputs)
        forms = [_Form.of(value) if isinstance(value, Tensor) else None for value in example_inputs]
        if not any(forms):
            return None
        graph, copied = fx.Graph(), {}
        inputs: list[Any] = []
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        wholes: list[tuple[fx.Node, _Form, list[fx.Node]]] = []
        for node, value, form in zip(placeholders, example_inputs, forms, strict=True):
            if form is None:
                copied[node] = graph.node_copy(node)
                inputs.append(value)
                continue
            fake = node.meta.get("example_value", node.meta.get("val"))
            parts = form.flat(value)
            fakes = _fake_parts(fake, form)
            made = []
            for index, part in enumerate(parts):
                own = graph.placeholder(f"{node.name}_{index}")
                own.meta = {**node.meta, WHOLE: value, "example_value": fakes[index]}
                own.meta.pop("val", None)
                made.append(own)
                inputs.append(part)
            wholes.append((node, form, made))
        for node, form, made in wholes:
            copied[node] = graph.call_function(_maker(form), tuple(made))
        graph.output(graph.graph_copy(graph_module.graph, copied))
        return cls(fx.GraphModule(graph_module, graph), inputs, forms)

    @property
    def classes(self) -> str:
        """Names of the classes that were taken apart."""
        return ", ".join(sorted({form.kind.__name__ for form in self._forms if form is not None}))

    def flat(self, args: Sequence[Any]) -> list[Any]:
        """The inputs of ``graph_module`` for those of the graph that it was made of."""
        found: list[Any] = []
        for value, form in zip(args, self._forms, strict=True):
            found += [value] if form is None else form.flat(value)
        return found

    def whole(self, flat: Sequence[Any]) -> list[Any]:
        """The other way round."""
        rest = list(flat)
        return [rest.pop(0) if form is None else form.whole(rest) for form in self._forms]


def check_inputs(example_inputs: Sequence[Any]) -> None:
    """Refuse what no key can tell apart: packed weights, and tensors that do not say what they are made of.

    Raises:
        UnsupportedGraphError: there is such an input.
    """
    for value in example_inputs:
        if isinstance(value, torch.ScriptObject):
            detail = "weights are packed by a kernel library, which keeps their bytes to itself"
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


def _fake_parts(fake: Any, form: _Form) -> list[Any]:
    if not isinstance(fake, Tensor) or _names(_Form.of(fake)) != _names(form):
        detail = f"an input that is a {form.kind.__name__} was traced as something else"
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, detail)
    if any(not isinstance(size, int) for size in fake.shape):
        detail = f"an input that is a {form.kind.__name__} has sizes that change"
        raise UnsupportedGraphError(Reason.CAPTURE_FAILED, detail)
    return form.flat(fake)


def _names(form: _Form | None) -> Any:
    return None if form is None else [(name, _names(inner)) for name, inner in form.parts]


def _maker(form: _Form) -> Any:
    def whole(*tensors: Tensor) -> Any:
        return form.whole(list(tensors))

    return whole
