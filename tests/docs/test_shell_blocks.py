"""Shell lines of the manual: commands of ``vlcache`` parse, those of a store run, others name what exists.

``NOT_RUN`` has the reason for each line that is not run, and ``TRANSCRIPTS`` for each printed output that no
test compares. Python blocks have theirs in their fence, see ``blocks.py``.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlcache_fx.cli import app
from vlcache_fx.store import Entry, open_store

from ..cli.test_app import COMMANDS
from .blocks import PAGES, ROOT

NOT_RUN = {
    "vlcache serve": "serves until it is stopped; tests/serve runs it",
    "vlcache warm-up": "compiles for minutes; tests/serve/test_warm_up.py runs it",
    "vlcache top": "needs a server; tests/cli/test_top.py runs it with one",
    "vlcache explain": "loads a model; tests/cli/test_explain.py runs it",
    "vlcache doctor": "compiles and loads a model; tests/cli/test_doctor.py and tests/doctor run it",
    "vlcache fidelity": "measures for minutes; tests/fidelity/test_reference.py runs it",
    "vlcache gate": "measures for minutes; tests/cli/test_gate.py runs it",
    "vlcache calibrate": "measures for minutes; tests/fidelity/test_reference.py runs it",
    "vlcache --install-completion": "changes the shell; tests/cli/test_app.py completes words",
    "make": "its targets take minutes; they are those of CI",
    "pip": "installs packages",
    "apt-get": "installs packages",
    "python": "examples and studies, which take minutes; tests/examples runs them",
    "curl": "needs a server; tests/serve/test_server.py sends such requests",
    "ray": "needs several machines",
    "export": "sets a variable of the shell for the next line",
}

TRANSCRIPTS = {
    "command-line.md": "versions and times of one machine; tests/doctor compares the lines",
    "life-of-a-graph.md": "a picture, no output",
    "life-of-a-request.md": "a picture, no output",
    "metrics.md": "counts of one server; tests/cli/test_top.py compares tables",
    "recurrent-layers.md": "a picture, no output",
    "serve.md": "times of one machine; tests/cli/test_serve.py compares the lines",
    "store.md": "files of a folder; tests/store/file compares them",
    "troubleshooting.md": "times of one machine; tests/compiler/test_compile_clock.py compares the line",
    "torch-compile.md": "a refusal with paths of one machine; tests/test_refusals.py compares refusals",
}

GENERATED = re.compile(r"^<!-- ([\w -]+): begin -->\n.*?^<!-- \1: end -->$", re.MULTILINE | re.DOTALL)
"""Sections that a test compares with what the code makes now."""


def fenced(text: str, language: str) -> list[str]:
    """The bodies of the blocks of a language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command in the shell blocks of a page, without pipes and comments."""
    for block in fenced(page.read_text(encoding="utf-8"), "sh"):
        for line in _lines(block):
            words = _first(shlex.split(line, comments=True))
            if words:
                yield words


def _lines(block: str) -> Iterator[str]:
    """Yield whole commands: lines that end in a backslash or within quotes go on."""
    whole = ""
    for line in block.splitlines():
        whole = f"{whole}\n{line}" if whole else line
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        if whole.split("#")[0].count("'") % 2 == 0:
            yield whole
            whole = ""


def _first(words: list[str]) -> list[str]:
    """The command before a pipe or redirection, without variables in front of it."""
    end = next((index for index, word in enumerate(words) if word in ("|", ">", "&")), len(words))
    begin = next((index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), end)
    return words[begin:end]


ALL = [(page, words) for page in PAGES for words in commands_of(page)]
STORE = [words for _, words in ALL if words[:2] == ["vlcache", "store"]]


def name_of(words: list[str]) -> str:
    """The key of a command in ``NOT_RUN``."""
    return " ".join(words[:2]) if words[0] == "vlcache" else words[0]


def test_every_line_is_run_or_has_a_reason() -> None:
    names = {name_of(words) for _, words in ALL} - {"vlcache store"}
    assert names == set(NOT_RUN)


def test_every_output_is_compared_or_has_a_reason() -> None:
    pages = {page.name for page in PAGES if fenced(GENERATED.sub("", page.read_text("utf-8")), "text")}
    assert pages == set(TRANSCRIPTS)


def test_commands_parse() -> None:
    """Raises if an option or an argument is not valid."""
    for page, (program, *words) in ALL:
        if program == "vlcache" and words != ["--install-completion"]:
            (own,) = [own for own in COMMANDS if tuple(words[: len(own)]) == own]
            assert COMMANDS[own].make_context(page.name, words[len(own) :]).params


def test_what_other_programs_are_told_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, (program, *words) in ALL:
        match program, words:
            case "make", [target, *_]:
                assert f"\n{target}:" in makefile
            case "python", ["-m", module, *_]:
                assert find_spec(module) is not None
            case "python", [path, *_]:
                assert path == "serve_my_model.py" or (ROOT / path).is_file()
            case "pip", [*_, package]:
                named = re.search(r"\[(.*)\]", package)
                assert set(named[1].split(",") if named else ()) <= set(extras)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with an entry."""
    store = open_store(f"file://{tmp_path}/store", 2**20)
    store.put("donor-aa-bb-41f2", Entry({"k": torch.zeros(4)}, {}))
    store.close()
    return tmp_path / "store"


@pytest.mark.parametrize("words", STORE, ids=" ".join)
def test_commands_of_a_store_run(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLCACHE_STORE", f"file://{folder}")
    arguments = [
        re.sub(r"^(file:///var/cache/vlcache|mooncake://.*)$", f"file://{folder}", word) for word in words
    ]
    result = CliRunner().invoke(app, arguments[1:])
    assert result.exit_code == 0, result.output
    if "--json" in words:
        assert json.loads(result.stdout)["used_bytes"] > 0  # as docs/command-line.md asks jq
