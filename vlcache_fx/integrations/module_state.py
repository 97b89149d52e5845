"""What a module that runs eagerly computes, beside its weights, as a digest.

Nobody traces an encoder that ``generate()`` runs. What it gives depends on its weights and inputs, and also
on configuration, hooks, replaced methods, plain attributes of its submodules, and the code of the functions
that they call. All of that is walked, as an object graph, and written as text. Two models with the same text
and the same weights compute the same. Where something is met that cannot be written (an open file, say),
nothing is known and nothing is reused.

A walk takes milliseconds, so it notes what it read. The next call compares that by identity, and walks again
where something else is there.
"""

from __future__ import annotations

import enum
import functools
import logging
import operator
import sys
import types
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlcache_fx.keys.digest import content_digest

_log = logging.getLogger(__name__)

PLAIN = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice, PurePath)
TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo)
BY_NAME = (
    types.BuiltinFunctionType,
    types.ModuleType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
Note: TypeAlias = tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]
"""How to read some values, and those that were read: to be compared by identity."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ITERATIONS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
WEIGHTS = ("_parameters", "_buffers", "_modules")
WITHOUT_NUMBERS = frozenset(
    {"_contextvars", "_thread", "_weakref", "inspect", "logging", "threading", "warnings", "weakref"}
)
"""Modules whose objects hold nothing that is computed with: locks, loggers, signatures."""

SMALL_BYTES = 1 << 20
"""Tensors in plain attributes are read whole in every call, up to this size."""

MOST_ENTRIES = 256
"""Of a global table; larger ones are registries, known by their names."""

OURS, TORCH = "vlcache_fx", "torch"
BASES = ("builtins", "abc", "typing", "collections", "enum")
METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


class UnknownStateError(Exception):
    """Something was met that cannot be written."""


class ModuleState:
    """The digest of one module's state, followed from call to call.

    Args:
        roots: what is called: the module, and the function that is given to it, say.
        weights: lists the tensors that have a fingerprint of their own, wherever they are met.
    """

    def __init__(self, *roots: Any, weights: Callable[[], Sequence[Tensor]] = tuple) -> None:
        self._roots, self._weights = roots, weights
        self._notes: list[Note] = []
        self._digest: str | None = None
        self._was_read = False

    def digest(self) -> str | None:
        """64 hexadecimal digits; None where the state cannot be known."""
        if not self._was_read or not all(map(_is_as_noted, self._notes)):
            self._digest, self._notes = _walked(self._roots, self._weights())
            self._was_read = True
        return self._digest


def _walked(roots: tuple[Any, ...], weights: Sequence[Tensor]) -> tuple[str | None, list[Note]]:
    names = frozenset({"forward", "__call__", "training"})
    while True:  # until no function calls a method that was not written yet
        walk = _Walk(names, roots[0], weights)
        try:
            text = [walk.text(root) for root in roots]
            if walk.names <= names:
                return content_digest(text), walk.notes
        except Exception as error:  # noqa: BLE001 - objects of any class are asked for what they hold
            _log.debug("the state of %s is not known: %s", type(roots[0]).__name__, error)
            return None, walk.notes
        names |= walk.names


def _is_as_noted(note: Note) -> bool:
    read, before = note
    now = read()
    return len(now) == len(before) and (
        all(map(operator.is_, now, before)) or all(map(_is_same, now, before))
    )


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in (str, int) and one == other)


class _Walk:
    """Writes an object graph; what was written before is named by its number.

    Args:
        wanted: of modules and classes, what has one of these names is written. The rest is not read by what
            is called: results that a model leaves in an attribute for later, say.
        owner: of the method that is called; its ``forward`` is not.
        weights: see ``ModuleState``.

    Attributes:
        notes: what was read, and how to read it again.
        names: that the functions written use, of attributes and methods.
    """

    def __init__(self, wanted: frozenset[str], owner: Any, weights: Sequence[Tensor]) -> None:
        self.notes: list[Note] = []
        self.names: set[str] = set()
        self._wanted, self._owner = wanted, type(owner)
        self._iterates = bool(ITERATIONS & wanted)
        self._weights = {id(tensor): index for index, tensor in enumerate(weights)}
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is used twice

    def text(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if type(value) in PLAIN or isinstance(value, TORCH_PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, BY_NAME):
            return f"{type(value).__name__} {getattr(value, '__module__', '')}.{value.__name__}"
        if id(value) in self._numbers:
            return f"#{self._numbers[id(value)]}"
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        return self._written(value)

    def _written(self, value: Any) -> str:
        match value:
            case Tensor():
                return self._tensor(value)
            case nn.Module():
                return self._module(value)
            case type():
                return self._class(value)
            case types.FunctionType():
                return self._function(value)
            case types.MethodType():
                return f"method {self.text(value.__func__)} of {self.text(value.__self__)}"
            case functools.partial():
                return f"partial {self.text((value.func, value.args, value.keywords))}"
            case staticmethod() | classmethod():
                return f"{type(value).__name__} {self.text(value.__func__)}"
            case property():
                return f"property {self.text((value.fget, value.fset))}"
            case functools.cached_property():
                return f"cached {self.text(value.func)}"
            case types.CodeType():
                return self._code(value)
            case dict() | types.MappingProxyType():
                self._note(lambda: (*value.keys(), *value.values()))
                pairs = [f"{self.text(key)}: {self.text(one)}" for key, one in value.items()]
                return f"{type(value).__name__} {{{', '.join(pairs)}}}" + self._attributes(value)
            case list() | tuple():
                self._note(lambda: tuple(value))
                return f"{type(value).__name__} [{', '.join(map(self.text, value))}]"
            case AbstractSet():
                self._note(lambda: tuple(value))
                return f"set {sorted(map(self.text, value))}"
        return self._object(value)

    def _note(self, read: Callable[[], tuple[Any, ...]]) -> None:
        self.notes.append((read, read()))

    def _tensor(self, value: Tensor) -> str:
        if id(value) in self._weights:
            return f"weight {self._weights[id(value)]}"
        if value.nbytes > SMALL_BYTES:
            raise UnknownStateError("a large tensor that is neither a parameter nor a buffer")
        self._note(lambda: (content_digest([value]),))  # nobody else would notice a write to it
        return content_digest([value])

    def _module(self, module: nn.Module) -> str:
        held = vars(module)
        # Of torch's own modules, nobody looks into ``forward``: all of their settings count.
        is_whole = _package(type(module).__module__) == TORCH
        names = [
            name
            for name in held
            if name not in WEIGHTS and (is_whole or name in self._wanted or name.endswith("_hooks"))
        ]
        # Most are empty: hooks that nobody has registered.
        empty = [name for name in names if isinstance(held[name], dict) and not held[name]]
        empties = [held[name] for name in empty]
        children = {name: child for name, child in module._modules.items() if self._is_read(module, name)}
        self._note(lambda: (type(module), len(held), *map(held.get, names), *map(len, empties)))
        self._note(lambda: (len(module._modules), *map(module._modules.get, children)))
        plain = [f"{name}={self.text(held[name])}" for name in names if name not in empty]
        weights = [f"{name} {None if one is None else one.dtype}" for name, one in self._held(module)]
        below = [f"{name}: {self.text(child)}" for name, child in children.items()]
        return f"{self.text(type(module))} {plain} {weights} {below}"

    def _is_read(self, module: nn.Module, name: str) -> bool:
        """Whether a child may be called: by its name, or as one of many."""
        return (
            name in self._wanted
            or self._iterates
            or isinstance(module, CONTAINERS)
            or not name.isidentifier()
        )

    @staticmethod
    def _held(module: nn.Module) -> list[tuple[str, Tensor | None]]:
        return [*module._parameters.items(), *module._buffers.items()]

    def _class(self, kind: type) -> str:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _package(kind.__module__) in (TORCH, OURS, *BASES):
            return f"class {name}"
        owners = [one for one in kind.__mro__ if _package(one.__module__) not in (TORCH, *BASES)]
        methods = [
            (key, one)
            for owner in owners
            for key, one in list(vars(owner).items())
            if key in self._wanted and isinstance(one, METHODS)
            if not (kind is self._owner and key == "forward")
        ]
        spaces = [vars(owner) for owner in owners]
        keys = [key for key, _ in methods]
        # A method that is added makes a class larger; one that is replaced stands under its name.
        self._note(lambda: (*map(len, spaces), *(space.get(key) for space in spaces for key in keys)))
        return f"class {name} {[f'{key}: {self.text(one)}' for key, one in methods]}"

    def _function(self, function: types.FunctionType) -> str:
        home = str(function.__globals__.get("__name__", ""))
        if _package(home) == OURS:
            return f"ours {home}.{function.__qualname__}"
        cells = function.__closure__ or ()
        self._note(lambda: (function.__code__, function.__defaults__, *map(_content, cells)))
        held = [self.text(_content(cell)) for cell in cells]
        if _package(home) == TORCH:  # a decorator of torch, around something else
            return f"{home}.{function.__qualname__} {held}"
        names = _global_names(function.__code__)
        space = function.__globals__
        self._note(lambda: tuple(space.get(name) for name in names))
        self.names.update(names, _spoken(function.__code__))
        read = [f"{name}={self._global(space[name], home)}" for name in names if name in space]
        settings = self.text((function.__defaults__, function.__kwdefaults__))
        return f"function {self.text(function.__code__)} {settings} {held} {read}"

    def _global(self, value: Any, home: str) -> str:
        """A global name that a function of the module ``home`` reads.

        Of other packages the name is enough: the note says whether something else has it.
        """
        owner = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else None
        owner = owner or getattr(value, "__module__", None) or type(value).__module__
        is_near = _package(owner) == _package(home) or type(value) in PLAIN
        if type(value) in (dict, list, set, tuple):
            is_near = len(value) <= MOST_ENTRIES
        if not is_near or isinstance(value, type | types.ModuleType):
            return f"{owner}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        try:
            return self.text(value)
        except UnknownStateError:
            return f"{owner}.{type(value).__qualname__}"

    def _code(self, code: types.CodeType) -> str:
        consts = [self.text(one) for one in code.co_consts]
        return content_digest([code.co_code, str(code.co_names), str(code.co_varnames), str(consts)])

    def _object(self, value: Any) -> str:
        kind = type(value)
        if _package(kind.__module__) == OURS:
            return f"ours {kind.__qualname__}"
        if kind is object or kind.__module__ in WITHOUT_NUMBERS:
            return f"{kind.__module__}.{kind.__qualname__}"
        if not hasattr(value, "__dict__") or not _is_of_python(kind):
            raise UnknownStateError(f"a {kind.__module__}.{kind.__qualname__}")
        return f"{self.text(kind)}{self._attributes(value)}"

    def _attributes(self, value: Any) -> str:
        held = getattr(value, "__dict__", None)
        if not held:
            return ""
        self._note(lambda: tuple(vars(value).values()))
        return f" ({', '.join(f'{name}={self.text(one)}' for name, one in list(held.items()))})"


def _is_of_python(kind: type) -> bool:
    """Whether the attributes of its objects are all that they hold: a file holds more."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or (file is not None and file.endswith(".py"))


def _package(module: str | None) -> str:
    return str(module).partition(".")[0]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code, and functions within it, may look up."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _global_names(one)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _spoken(code: types.CodeType) -> set[str]:
    """Text in the code that may be a name, as ``getattr`` takes it."""
    found = {one for one in code.co_consts if isinstance(one, str) and one.isidentifier()}
    return found.union(*(_spoken(one) for one in code.co_consts if isinstance(one, types.CodeType)))
