"""Nothing in a store can run code of whoever wrote the bytes."""

from __future__ import annotations

import ast
from pathlib import Path

import vlcache_fx.store

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "numpy.lib.format",
}
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.save",
    "eval",
    "exec",
    "np.load",
    "numpy.load",
    "np.save",
    "numpy.save",
}


def forbidden(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
            found += [node.module] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
            found += [name for name in names if name in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(ast.unparse(node.func))
    return found


def test_store_has_no_pickle() -> None:
    sources = sorted(Path(vlcache_fx.store.__file__).parent.rglob("*.py"))
    assert len(sources) > 5
    assert {path.name: found for path in sources if (found := forbidden(path.read_text()))} == {}


def test_scan_finds_what_it_looks_for() -> None:
    source = "import pickle\nfrom marshal import loads\nfrom torch import save\nimport torch\ntorch.load('x')"
    assert sorted(forbidden(source)) == ["marshal", "pickle", "torch.load", "torch.save"]
