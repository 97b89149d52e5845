"""Text description of an object graph: modules, classes, functions and their attributes.

Equal texts mean equal computations, given equal weights. ``module_state`` computes digests of the text.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vlcache_fx.keys.digest import content_digest

PLAIN = (int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice, PurePath)
TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, torch.finfo)
BY_NAME = (
    types.BuiltinFunctionType,
    types.ModuleType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)
Note: TypeAlias = tuple[Callable[[], tuple[Any, ...]], tuple[Any, ...]]
"""A function that reads some values, and the values that it returned during the walk."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ITERATIONS = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
WEIGHTS = ("_parameters", "_buffers", "_modules")
IRRELEVANT_MODULES = frozenset(
    {"_contextvars", "_thread", "_weakref", "inspect", "logging", "threading", "warnings", "weakref"}
)
"""Modules whose objects do not affect computations: locks, loggers, signatures."""

PROVENANCE = frozenset(
    {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "model_type"}
)
"""Attributes of configurations that say where a model came from. The class says the type of model."""

SMALL_BYTES = 1 << 20
"""Tensors in plain attributes are hashed in every call up to this size."""

MAX_ENTRIES = 256
"""Larger global tables count as registries and are described by name."""

OURS, TORCH = "vlcache_fx", "torch"
BASES = ("builtins", "abc", "typing", "collections", "enum")
METHODS = (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)


class UnknownStateError(Exception):
    """An object cannot be described."""


class ObjectGraph:
    """Describes an object graph as text; objects described before appear as their number.

    Args:
        wanted: names of the attributes of modules and classes to describe. Called functions do not read
            others, such as results that a model stores in an attribute.
        owner: owner of the called method; its ``forward`` is not called.
        weights: tensors to describe by index.

    Attributes:
        notes: the values read, and functions to read them again.
        names: names of attributes and methods that the described functions use.
    """

    def __init__(self, wanted: frozenset[str], owner: Any, weights: Sequence[Tensor]) -> None:
        self.notes: list[Note] = []
        self.names: set[str] = set()
        self._wanted, self._owner = wanted, type(owner)
        self._iterates = bool(ITERATIONS & wanted)
        self._weights = {id(tensor): index for index, tensor in enumerate(weights)}
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # keeps objects alive, so that no id is reused

    def text(self, value: Any) -> str:
        """Return the description of ``value``.

        Raises:
            UnknownStateError: an object in it cannot be described.
        """
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if type(value) in PLAIN or isinstance(value, TORCH_PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, BY_NAME):
            return f"{type(value).__name__} {getattr(value, '__module__', '')}.{value.__name__}"
        if type(value) in (tuple, frozenset) and _is_constant(value):
            # Not numbered: whether equal constants are one object depends on how Python loaded the code.
            return f"{type(value).__name__} [{', '.join(self._texts(value))}]"
        if id(value) in self._numbers:
            return f"#{self._numbers[id(value)]}"
        self._number(value)
        return self._describe(value)

    def _number(self, value: Any) -> None:
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)

    def _describe(self, value: Any) -> str:
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
                self._note(functools.partial(_of_mapping, value))
                pairs = [f"{self.text(key)}: {self.text(item)}" for key, item in value.items()]
                return f"{type(value).__name__} {{{', '.join(pairs)}}}" + self._attributes(value)
            case list() | tuple():
                self._note(lambda: tuple(value))
                return f"{type(value).__name__} [{', '.join(map(self.text, value))}]"
            case AbstractSet():
                self._note(lambda: tuple(value))
                return f"set {self._texts(value)}"
        return self._object(value)

    def _texts(self, values: Iterable[Any]) -> list[str]:
        # Numbers follow the order of visits, which must not be that of a set, another one in each process.
        ordered = sorted(values, key=_name) if isinstance(values, AbstractSet) else values
        return [self.text(value) for value in ordered]

    def _note(self, read: Callable[[], tuple[Any, ...]]) -> None:
        self.notes.append((read, read()))

    def _tensor(self, value: Tensor) -> str:
        if id(value) in self._weights:
            return f"weight {self._weights[id(value)]}"
        if value.nbytes > SMALL_BYTES:
            raise UnknownStateError("a large tensor that is neither a parameter nor a buffer")
        self._note(lambda: (content_digest([value]),))  # detects writes to it
        return content_digest([value])

    def _module(self, module: nn.Module) -> str:
        attributes = vars(module)
        # The ``forward`` of torch's own modules is not walked, so all of their settings count.
        is_torch = _package(type(module).__module__) == TORCH
        names = [
            name
            for name in attributes
            if name not in WEIGHTS and (is_torch or name in self._wanted or name.endswith("_hooks"))
        ]
        # Most attributes are empty dictionaries of hooks.
        empty = [name for name in names if isinstance(attributes[name], dict) and not attributes[name]]
        empties = [attributes[name] for name in empty]
        children = {name: child for name, child in module._modules.items() if self._is_read(module, name)}
        self._note(lambda: (type(module), len(attributes), *map(attributes.get, names), *map(len, empties)))
        self._note(lambda: (len(module._modules), *map(module._modules.get, children)))
        plain = [f"{name}={self.text(attributes[name])}" for name in names if name not in empty]
        tensors = [*module._parameters.items(), *module._buffers.items()]
        weights = [f"{name} {None if tensor is None else tensor.dtype}" for name, tensor in tensors]
        below = [f"{name}: {self.text(child)}" for name, child in children.items()]
        return f"{self.text(type(module))} {plain} {weights} {below}"

    def _is_read(self, module: nn.Module, name: str) -> bool:
        """Return whether a child may be called, by name or in an iteration."""
        return (
            name in self._wanted
            or self._iterates
            or isinstance(module, CONTAINERS)
            or not name.isidentifier()
        )

    def _class(self, kind: type) -> str:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _package(kind.__module__) in (TORCH, OURS, *BASES):
            return f"class {name}"
        owners = [base for base in kind.__mro__ if _package(base.__module__) not in (TORCH, *BASES)]
        methods = [
            (key, method)
            for owner in owners
            for key, method in list(vars(owner).items())
            if key in self._wanted and isinstance(method, METHODS)
            if not (kind is self._owner and key == "forward")
        ]
        spaces = [vars(owner) for owner in owners]
        keys = [key for key, _ in methods]
        # Added methods change the class's length, replaced methods the value under their key.
        self._note(lambda: (*map(len, spaces), *(space.get(key) for space in spaces for key in keys)))
        return f"class {name} {[f'{key}: {self.text(method)}' for key, method in methods]}"

    def _function(self, function: types.FunctionType) -> str:
        home = str(function.__globals__.get("__name__", ""))
        if _package(home) == OURS:
            return f"ours {home}.{function.__qualname__}"
        cells = function.__closure__ or ()
        self._note(lambda: (function.__code__, function.__defaults__, *map(_content, cells)))
        closure = [self.text(_content(cell)) for cell in cells]
        if _package(home) == TORCH:  # a decorator of torch around another function
            return f"{home}.{function.__qualname__} {closure}"
        names = _global_names(function.__code__)
        space = function.__globals__
        self._note(lambda: tuple(space.get(name) for name in names))
        self.names.update(names, _possible_names(function.__code__))
        read = [f"{name}={self._global(space[name], home)}" for name in names if name in space]
        settings = self.text((function.__defaults__, function.__kwdefaults__))
        return f"function {self.text(function.__code__)} {settings} {closure} {read}"

    def _global(self, value: Any, home: str) -> str:
        """Describe a global that a function of the module ``home`` reads.

        Objects of other packages are described by name; the note detects replacements.
        """
        owner = value.__globals__.get("__name__") if isinstance(value, types.FunctionType) else None
        owner = owner or getattr(value, "__module__", None) or type(value).__module__
        is_near = _package(owner) == _package(home) or type(value) in PLAIN
        if type(value) in (dict, list, set, tuple):
            is_near = len(value) <= MAX_ENTRIES
        if not is_near or isinstance(value, type | types.ModuleType):
            return f"{owner}.{getattr(value, '__qualname__', type(value).__qualname__)}"
        try:
            return self.text(value)
        except UnknownStateError:
            return f"{owner}.{type(value).__qualname__}"

    def _code(self, code: types.CodeType) -> str:
        consts = [self.text(const) for const in code.co_consts]
        return content_digest([code.co_code, str(code.co_names), str(code.co_varnames), str(consts)])

    def _object(self, value: Any) -> str:
        kind = type(value)
        if _package(kind.__module__) == OURS:
            return f"ours {kind.__qualname__}"
        if kind is object or kind.__module__ in IRRELEVANT_MODULES:
            return f"{kind.__module__}.{kind.__qualname__}"
        if not hasattr(value, "__dict__") or not _is_of_python(kind):
            raise UnknownStateError(f"a {kind.__module__}.{kind.__qualname__}")
        if hasattr(kind, "to_json_string"):
            return f"{self.text(kind)} {self._configuration(value)}"
        return f"{self.text(kind)}{self._attributes(value)}"

    def _configuration(self, value: Any) -> str:
        """Describe a configuration of the transformers library by its settings, in the order of their names.

        A model that was built and one that was loaded, from whichever folder, have equal settings.
        """
        self._note(lambda: tuple(vars(value).values()))
        return self._sorted({name: item for name, item in vars(value).items() if name not in PROVENANCE})

    def _sorted(self, settings: dict[Any, Any]) -> str:
        texts = []
        for name, item in sorted(settings.items(), key=lambda pair: str(pair[0])):
            if type(item) is dict and id(item) not in self._numbers:  # files sort these as well
                self._number(item)
                self._note(functools.partial(_of_mapping, item))
                texts.append(f"{self.text(name)}: {self._sorted(item)}")
            else:
                named = getattr(torch, item, None) if name == "dtype" and isinstance(item, str) else None
                texts.append(f"{self.text(name)}: {self.text(named or item)}")
        return f"{{{', '.join(texts)}}}"

    def _attributes(self, value: Any) -> str:
        attributes = getattr(value, "__dict__", None)
        if not attributes:
            return ""
        self._note(lambda: tuple(vars(value).values()))
        return f" ({', '.join(f'{name}={self.text(item)}' for name, item in list(attributes.items()))})"


def _of_mapping(mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    return (*mapping.keys(), *mapping.values())


def _is_constant(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) in (tuple, frozenset) and all(map(_is_constant, value)))


def _name(value: Any) -> str:
    """Return what sorts the members of a set in the same order in every process."""
    named = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return f"{type(value).__name__} {value!r}" if _is_constant(value) else named


def _is_of_python(kind: type) -> bool:
    """Return whether the class is written in Python, so that attributes are its objects' complete state."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return kind.__module__ == "__main__" or (file is not None and file.endswith(".py"))


def _package(module: str | None) -> str:
    return str(module).partition(".")[0]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that the code and its inner functions may look up."""
    inner = [name for inner_code in _inner_codes(code) for name in _global_names(inner_code)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _possible_names(code: types.CodeType) -> set[str]:
    """Return the string constants of the code that may be names for ``getattr``."""
    names = {const for const in code.co_consts if isinstance(const, str) and const.isidentifier()}
    return names.union(*map(_possible_names, _inner_codes(code)))


def _inner_codes(code: types.CodeType) -> list[types.CodeType]:
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]
