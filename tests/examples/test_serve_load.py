"""The load test of servers, with a small server in place of the real ones."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from examples.serve_load import __main__ as command
from examples.serve_load import models, packages, vllm_bench
from examples.serve_load.load import Load, Result, send
from examples.serve_load.systems import System, serving
from examples.serve_load.traces import PAGES, STEPS, TRACES, WINDOW, Ask, agent, chat, documents, questions
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError

SERVER = Path(__file__).with_name("serve_load_server.py")
SIDE = 16


def pictures(ask: Ask) -> list[str]:
    return [
        part["image_url"]["url"]
        for message in ask.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


def test_documents_ask_about_few_pictures() -> None:
    asks = documents(20, 0, SIDE)
    assert {len(pictures(ask)) for ask in asks} == {2}
    assert len({url for ask in asks for url in pictures(ask)}) == PAGES
    assert len({ask.session for ask in asks}) == 20


def test_new_pictures_never_return() -> None:
    asks = TRACES["new pictures"](20, 0, SIDE)
    assert len({url for ask in asks for url in pictures(ask)}) == 40


def test_agent_sees_a_window_of_screenshots() -> None:
    asks = agent(2 * STEPS, 0, SIDE)
    first = asks[:STEPS]
    assert [len(pictures(ask)) for ask in first] == [min(step + 1, WINDOW) for step in range(STEPS)]
    for before, after in zip(first[WINDOW - 1 :], first[WINDOW:], strict=False):
        assert pictures(after)[:-1] == pictures(before)[1:]
    assert {ask.session for ask in asks} == {0, 1}


def test_chats_send_everything_again() -> None:
    asks = chat(STEPS, 0, SIDE)
    for before, after in pairwise(asks):
        assert after.messages[: len(before.messages)] == before.messages
    assert len({url for ask in asks for url in pictures(ask)}) == 1


@pytest.mark.parametrize("returning", [True, False])
def test_questions_have_answers(returning: bool) -> None:
    asks = questions(12, 0, returning=returning)
    assert all(ask.answer for ask in asks)
    assert len({url for ask in asks for url in pictures(ask)}) == (min(PAGES, 12) if returning else 12)


def test_traces_are_reproducible() -> None:
    for make in TRACES.values():
        assert make(6, 3, SIDE) == make(6, 3, SIDE)
        assert make(6, 3, SIDE) != make(6, 4, SIDE)


def test_summary() -> None:
    asks = [Ask(0, [], "a"), Ask(1, [], "b"), Ask(2, [], "c"), Ask(3, [], None)]
    results = [
        Result(" a", 0.1, 0.2, 10, 5, 2),
        Result("x", 0.3, 0.4, 10, 0, 2),
        Result("", 0.0, 0.1, failure="APIError: gone"),
        Result("anything", 0.2, 0.3, 20, 20, 4),
    ]
    untold = Load([Result("a", 0.1, 0.2, 10, None, 2)], 1.0).summary(asks[:1])
    assert untold["cached_share"] is None
    found = Load(results, 2.0).summary(asks)
    assert found["ttft_ms"]["50"] == pytest.approx(200)
    assert (found["requests"], found["failed"], found["wrong"]) == (4, 1, 2)
    assert (found["requests_per_s"], found["tokens_per_s"]) == (1.5, 4.0)
    assert found["cached_share"] == pytest.approx(25 / 40)
    assert Load(results[3:], 1.0).summary(asks[3:])["wrong"] is None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A folder whose ``bin/python`` runs this interpreter."""
    made = Environment(tmp_path_factory.mktemp("peers"))
    (made.venv / "bin").mkdir(parents=True)
    python = made.venv / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def url(environment: Environment, port: int) -> Iterator[str]:
    system = System("small", ("python", str(SERVER), "{port}"))
    with serving(system, Path("unused"), port, environment, [0], 1) as found:
        yield found


def test_send(url: str) -> None:
    asks = documents(5, 0, SIDE)
    load = asyncio.run(send(asks, url, "any", at_once=2, answer_tokens=4, extra_body={}))
    assert [result.text for result in load.results] == ["2"] * 5
    assert all(0 < result.first_s <= result.total_s for result in load.results)
    assert [(one.prompt_tokens, one.cached_tokens) for one in load.results] == [(10, 5)] * 5
    given = {"vlcache": {"bypass": True}}
    load = asyncio.run(send(asks, url, "any", at_once=2, answer_tokens=4, extra_body=given))
    assert {result.cached_tokens for result in load.results} == {0}


def test_failures_are_results(url: str) -> None:
    load = asyncio.run(send(documents(2, 0, SIDE), url, "broken", at_once=2, answer_tokens=4, extra_body={}))
    assert all("no such model" in str(result.failure) for result in load.results)
    assert load.summary(documents(2, 0, SIDE))["failed"] == 2


def test_server_that_ends(environment: Environment) -> None:
    system = System("short", ("python", "-c", "print('I end')"))
    with (
        pytest.raises(PeerError, match=r"short ended with status 0; its output is in .*short\.log"),
        serving(system, Path("unused"), 1, environment, [0], 1),
    ):
        pass


def test_models_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 128, "LAYERS": 1, "HEADS": 2, "KV_HEADS": 1, "INTERMEDIATE": 64}.items():
        monkeypatch.setattr(models, name, value)
    folders = models.write_models(tmp_path, 64)
    assert set(folders) == {"reference", "times"}
    for folder in folders.values():
        assert json.loads((folder / "preprocessor_config.json").read_text())["max_pixels"] == 64 * 64
        assert "im_start" in (folder / "chat_template.jinja").read_text()
    weights = folders["times"] / "model.safetensors"
    before = weights.stat().st_mtime_ns
    models.write_models(tmp_path, 64)
    assert weights.stat().st_mtime_ns == before


def test_main(
    environment: Environment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    systems = (
        System("small", ("python", str(SERVER), "{port}")),
        System(
            "small, no reuse", ("python", str(SERVER), "{port}"), extra_body={"vlcache": {"bypass": True}}
        ),
    )
    folders = {name: tmp_path / name for name in ("reference", "times")}
    monkeypatch.setattr(command, "SYSTEMS", systems)
    monkeypatch.setattr(command, "write_models", lambda *_: folders)
    monkeypatch.setattr(Environment, "make", lambda *_: None)
    monkeypatch.setattr(packages, "install", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(command, "PORT", int(free.getsockname()[1]))
    output = tmp_path / "found.json"
    command.main(environment.folder, 4, 5, [1, 2], 16, 4, 2, "openai", None, ["documents", "agent"], output)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * 2 * 4
    assert {row["clients"] for row in rows} == {1, 2}
    assert {row["failed"] for row in rows} == {0}
    assert {row["cached_share"] for row in rows if row["system"] == "small"} == {0.5}
    assert {row["cached_share"] for row in rows if row["system"] != "small"} == {0.0}
    assert {row["wrong"] for row in rows if row["trace"].startswith("questions")} != {None}
    assert "TTFT p50" in capsys.readouterr().out


def test_server_that_does_not_answer(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = System("small", ("python", str(SERVER), "{port}"), served_name="broken")
    monkeypatch.setattr(command, "SYSTEMS", (broken,))
    monkeypatch.setattr(command, "write_models", lambda *_: {"times": tmp_path})
    monkeypatch.setattr(Environment, "make", lambda *_: None)
    monkeypatch.setattr(packages, "install", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(command, "PORT", int(free.getsockname()[1]))
    with pytest.raises(typer.Exit):
        command.main(environment.folder, 2, 0, None, 16, 4, 2, "openai", None, ["documents"], None)
    assert "error: small does not answer; its output is in" in capsys.readouterr().out.replace("\n", " ")


def test_packages_are_installed_once(tmp_path: Path) -> None:
    made = Environment(tmp_path)
    (made.venv / "bin").mkdir(parents=True)
    made.python.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\necho "torch==2.13.0"\n')
    made.python.chmod(0o755)
    said: list[str] = []
    for _ in range(2):
        packages.install(made, said.append)
    assert len(said) == 2
    assert (made.venv / packages.KEPT).read_text() == "torch==2.13.0\n"
    freeze, install = (made.venv / "bin" / "python.calls").read_text().splitlines()
    assert freeze.startswith("-m pip freeze")
    assert f"--constraint {made.venv / packages.KEPT} --editable={packages.ROOT}[serve]" in install


def test_a_failed_installation(tmp_path: Path) -> None:
    made = Environment(tmp_path)
    (made.venv / "bin").mkdir(parents=True)
    made.python.write_text("#!/bin/sh\necho no network\nexit 1\n")
    made.python.chmod(0o755)
    with pytest.raises(PeerError, match="pip freeze --exclude-editable failed with\nno network"):
        packages.install(made, lambda _: None)


def test_unknown_client(environment: Environment) -> None:
    with pytest.raises(typer.BadParameter, match="'curl' is no client: it must be one of openai, vllm-bench"):
        command.main(environment.folder, client="curl")


def test_result_file_of_vllm() -> None:
    found = {
        "duration": 2.0, "generated_texts": [" 3", ""], "ttfts": [0.2, 0.0], "itls": [[0.1, 0.1], []],
        "output_lens": [3, 0], "input_lens": [40, 40], "errors": ["", "gone"],
    }  # fmt: skip
    load = vllm_bench.read(found)
    assert [result.failure for result in load.results] == [None, "gone"]
    assert load.results[0].total_s == pytest.approx(0.4)
    assert load.summary([Ask(0, [], "3"), Ask(1, [], "4")])["wrong"] == 1


def test_content_of_one_message() -> None:
    (ask,) = documents(1, 0, SIDE)
    content = vllm_bench.content_of(ask)
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "text"]
    assert content[0]["text"].startswith(ask.messages[0]["content"])


def test_results_before_a_failure_are_kept(
    environment: Environment, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    good, bad = System("good", ("python", str(SERVER), "{port}")), System("bad", ("python", "-c", ""))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(command, "PORT", int(free.getsockname()[1]))
    monkeypatch.setattr(command, "SYSTEMS", (good, bad))
    monkeypatch.setattr(command, "write_models", lambda *_: {"times": tmp_path})
    monkeypatch.setattr(Environment, "make", lambda *_: None)
    monkeypatch.setattr(packages, "install", lambda *_: None)
    output = tmp_path / "found.json"
    with pytest.raises(typer.Exit):
        command.main(environment.folder, 2, 0, None, 16, 4, 2, "openai", None, ["documents"], output)
    assert [row["system"] for row in json.loads(output.read_text())["rows"]] == ["good"]
    assert "error: bad ended with status 0" in capsys.readouterr().out
