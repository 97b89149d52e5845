"""Public names use the words of the glossary in CONTRIBUTING.md, not those that they replaced.

Read from the source: names of modules, classes, functions, parameters, dataclass fields, passes and policies.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Words that no public name contains, as a whole word of it (``row_forms``, ``RowForm``), and what to write.
RETIRED_WORDS = {
    "addition": "deepstack",
    "additions": "deepstack",
    "arriving": "pending",
    "behind": "after",
    "deliver": "apply",
    "form": "spec, layout or metadata",
    "forms": "specs, layouts or metadata",
    "look": "check or summary",
    "looks": "checks or summaries",
    "piece": "block",
    "pieces": "blocks",
    "place": "dim, index or position",
    "places": "dims, indices or positions",
    "settle": "canonicalize",
    "tells": "host_inputs",
    "together": "stack",
    "told": "a noun",
    "unseen": "padding",
}
# Names that are not used as a whole; as a part of others they are plain English.
RETIRED_NAMES = {
    "Run": "MediaSpan",
    "goes_on": "continues_prompt",
    "is_whole": "is_integral, ignores_past or another fact",
    "known": "digests, host_args or another noun",
    "one": "the name of the thing",
    "runs": "media_spans",
    "runs_of": "media_spans_of",
}
# Standard terms that contain a retired word.
ALLOWED = re.compile(r"in_?place|norm_place", re.IGNORECASE)

# Inductor's cache on disk calls operators by keyword.
EXCEPTIONS = {"vlcache_fx/ops/attention.py": {"places"}}


def sources() -> list[Path]:
    return sorted(
        path for folder in ("vlcache_fx", "passes", "policies") for path in (ROOT / folder).rglob("*.py")
    )


def public_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Each public name that a module defines, with its line."""
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        parent, in_class = todo.pop()
        for node in ast.iter_child_nodes(parent):
            match node:
                case ast.ClassDef(name=name) if not name.startswith("_"):
                    yield name, node.lineno
                    todo.append((node, True))
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    if name.startswith("_") and not name.startswith("__"):
                        continue
                    yield name, node.lineno
                    yield from ((argument.arg, argument.lineno) for argument in arguments_of(node))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    if in_class:
                        yield name, node.lineno
                        yield from registered_name(name, node.value)
                case ast.Assign(targets=[ast.Name(id=name)]) if in_class:
                    yield from registered_name(name, node.value)
                case ast.If() | ast.Try():
                    todo.append((node, in_class))


def arguments_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    found = function.args
    more = [argument for argument in (found.vararg, found.kwarg) if argument is not None]
    return [*found.posonlyargs, *found.args, *found.kwonlyargs, *more]


def registered_name(attribute: str, value: ast.expr | None) -> Iterator[tuple[str, int]]:
    """The name of a pass or policy, from ``name = "..."``."""
    if attribute == "name" and isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value, value.lineno


def retired_in(name: str) -> dict[str, str]:
    """The retired words of a name, with their replacements."""
    if name in RETIRED_NAMES:
        return {name: RETIRED_NAMES[name]}
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", ALLOWED.sub("", name))
    return {word.lower(): RETIRED_WORDS[word.lower()] for word in words if word.lower() in RETIRED_WORDS}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_without_retired_words(path: Path) -> None:
    file = str(path.relative_to(ROOT))
    names = [(path.stem, 1), *public_names(ast.parse(path.read_text(encoding="utf-8")))]
    for name, line in names:
        for word, replacement in retired_in(name).items():
            if word not in EXCEPTIONS.get(file, ()):
                pytest.fail(
                    f"{file}:{line}: {name!r} contains the retired word {word!r}; write {replacement}"
                )


def test_exceptions_are_needed() -> None:
    for file, words in EXCEPTIONS.items():
        names = [name for name, _ in public_names(ast.parse((ROOT / file).read_text(encoding="utf-8")))]
        assert words == {word for name in names for word in retired_in(name)}, file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RowForm", {"form"}),
        ("flagged_places", {"places"}),
        ("runs", {"runs"}),
        ("platform", set()),
        ("number_of_runs", set()),
        ("write_in_place", set()),
        ("WriteInPlace", set()),
        ("known_policies", set()),
        ("known", {"known"}),
    ],
)
def test_retired_in_words(name: str, words: set[str]) -> None:
    assert set(retired_in(name)) == words


def test_public_names_kinds() -> None:
    tree = ast.parse(
        "class A:\n    name: ClassVar[str] = 'b'\n    c: int\n    d = 1\n    def e(self, f): ...\n"
        "    def __init__(self, g): ...\n    def _h(self, i): ...\n"
        "class _J:\n    k: int\n"
        "def l(m, *n, o, **p):\n    q: int = 1\n"
        "async def r(s): ...\nt: int = 1\n"
    )
    found = {name for name, _ in public_names(tree)}
    assert found - {"self", "name", "__init__"} == set("Abcefglmnoprs")
