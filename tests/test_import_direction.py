"""The order of packages in imports, read from the source, with imports inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package imports from itself and from the lines above, never from other packages of its line or below.
ORDER = [
    ["reasons"],
    ["errors", "version", "compiling", "log_output"],
    ["inserted_pass"],
    ["option_checks"],
    ["plan", "keys", "options"],
    ["spec", "store", "policies"],
    ["runtime", "ops"],
    ["ir"],
    ["capture"],
    ["analysis"],
    ["passes"],
    ["lowering"],
    ["integrations"],
    ["compiler"],
    ["backend", "explaining"],
    ["api", "deploy", "entry"],
    ["testing"],
    ["bench"],
    ["fidelity"],
    ["serve", "doctor"],
    ["cli"],
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}

# The packages that serve without graphs, independent of torch.fx. They import only each other.
NO_GRAPHS = ["plan", "keys", "spec", "store", "policies", "runtime"]
SERVES = {
    *NO_GRAPHS,
    "errors",
    "reasons",
    "inserted_pass",
    "log_output",
    "option_checks",
    "options",
    "version",
}
GRAPHS = ("torch.fx", "torch._dynamo", "torch._inductor", "torch._functorch")


def sources() -> list[Path]:
    top = [path for folder in ("vlcache_fx", "passes", "policies") for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in top if path != ROOT / "vlcache_fx/__init__.py")


def part_of(path: Path) -> str:
    first, second = path.relative_to(ROOT).parts[:2]
    return second.removesuffix(".py") if first == "vlcache_fx" else first


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of all imports, except those under ``TYPE_CHECKING``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_order(path: Path) -> None:
    part = part_of(path)
    assert part in RANK, f"say in ORDER where {part} belongs"
    for line, name in imported(path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        assert package not in ("passes", "policies"), f"{path}:{line}: import vlcache_fx.{package}"
        if package != "vlcache_fx" or other == part:
            continue
        if other in RANK:
            assert RANK[other] < RANK[part], f"{path}:{line}: {part} may not import {other}"
        else:
            # The package itself, for its version or public names: allowed above all of these.
            assert RANK[part] > RANK["api"], f"{path}:{line}: {part} may not import {name}"


@pytest.mark.parametrize("part", NO_GRAPHS)
def test_graph_free_packages_import_no_fx(part: str) -> None:
    """Neither torch.fx directly, nor packages of the compile half (ir, capture, analysis, passes, ...)."""
    for path in sources():
        if part_of(path) == part:
            for line, name in imported(path):
                package, _, rest = name.partition(".")
                is_graphs = f"{name}.".startswith(tuple(f"{one}." for one in GRAPHS))
                is_ours = package == "vlcache_fx" and rest.partition(".")[0] not in SERVES
                is_refused = is_graphs or is_ours
                assert not is_refused, f"{path}:{line}: {part} may not import {name}"


SERVE = """
import importlib, pkgutil, sys
import vlcache_fx.runtime, vlcache_fx.spec
for package in (vlcache_fx.runtime, vlcache_fx.spec):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(*{name.split(".")[1] for name in sys.modules if name.startswith("vlcache_fx.")})
"""


def test_serving_imports_no_fx() -> None:
    """In an interpreter, imports of the serving packages load nothing of the compile half."""
    loaded = subprocess.run([sys.executable, "-c", SERVE], check=True, capture_output=True, text=True).stdout
    packages = set(loaded.split())
    assert packages >= {"runtime", "spec"}
    assert packages <= SERVES


def test_sessions_load_no_compile_half() -> None:
    """Exported folders are served without a line of the compile half."""
    code = "import sys, vlcache_fx.deploy.sessions; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    packages = {name.split(".")[1] for name in loaded.split() if name.startswith("vlcache_fx.")}
    assert packages >= {"deploy", "runtime", "spec"}
    assert not packages & {"ir", "capture", "analysis", "passes", "lowering", "compiler", "backend"}


def test_import_reader_finds_nested_imports(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import hidden\nelse:\n    import b.c\n"
        "def f():\n    from a import x, y\n"
    )
    assert {name for _, name in imported(path)} == {"typing.TYPE_CHECKING", "b.c", "a.x", "a.y"}
