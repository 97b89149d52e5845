"""``vlcache gate``; ``tests/fidelity/test_gate.py`` tests what it decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlcache_fx
from vlcache_fx.cli import app
from vlcache_fx.cli.gate import replayed
from vlcache_fx.fidelity.prompts import Case, Prompt
from vlcache_fx.fidelity.questions import make_cases
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.testing import reference_vlm

QUICK = ["gate", "reference", "--family", "system_prompt", "--count", "1"]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The reference model, compiled once for this file."""
    model = vlcache_fx.compile(reference_vlm.load_model(), lowering="eager", dynamic=True, strict=True)
    return Subject("reference", model, reference_vlm.load_processor(), positions=1)


@pytest.fixture
def loaded(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The options with which the command loads it."""
    seen: list[dict[str, Any]] = []

    def load_subject(model: str, positions: int | None, options: dict[str, Any]) -> Subject:
        seen.append(options)
        return subject

    monkeypatch.setattr("vlcache_fx.fidelity.models.load_subject", load_subject)
    before = subject.engine.options
    yield seen
    subject.engine.set_options(before)
    subject.engine.resume()


def test_ask_ends_before_the_answer(subject: Subject) -> None:
    """The gate compares the first token of answers, not what follows them."""
    prompt = make_cases(reference_vlm, "single_hop", 1)[0].asked
    asked, answered = subject.ask(prompt), subject.prepare([prompt])
    (answer,) = answered.answers
    assert torch.equal(asked["input_ids"], answered.inputs["input_ids"][:, : -len(answer)])
    with torch.no_grad():
        logits = subject.model(**asked).logits[:, -1]
    torch.testing.assert_close(logits, subject.answer(answered)[:, 0], atol=1e-4, rtol=1e-4)


def test_passed(loaded: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(app, [*QUICK, "--min-agreement", "0", "--budget", "0.1", "--budget", "0.05"])
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ ")]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:4] == ["5 %", "0", "1.0", "1"]
    assert cells[-1] == "yes"
    assert "replaying prompts: 4" in result.stderr.splitlines()  # two, with two budgets
    assert "Passed (agreement of at least 0 %). Options for vlcache serve:\n--budget 0.05 " in result.stdout
    assert loaded[0]["policy"] == "layer_aware"
    assert loaded[0]["strict"] is True


@pytest.mark.usefixtures("loaded")
def test_passed_with_exact_returns_as_json() -> None:
    arguments = ["--min-agreement", "0", "--budget", "0.05", "--exact-returns", "2", "--json"]
    result = CliRunner().invoke(app, [*QUICK, *arguments])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["passed"], found["budget"], found["exact_returns"]) == (True, 0.05, 2)
    (trial,) = found["trials"]
    assert trial["donor_contexts"] == 3.0
    assert found["options"]["exact_returns"] == 2
    assert found["options"]["donor_contexts"] >= 3


@pytest.mark.usefixtures("loaded")
def test_not_passed() -> None:
    result = CliRunner().invoke(app, [*QUICK, "--max-kl", "0", "--budget", "0", "--budget", "0.05"])
    assert result.exit_code == 2, result.output
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("│ ")] == ["0", "5"]
    assert "Not passed (agreement of at least 99 %, mean KL of at most 0 nats)" in result.stdout
    as_json = CliRunner().invoke(app, [*QUICK, "--max-kl", "0", "--budget", "0", "--json"])
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["options"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate", "nowhere"], "no model 'nowhere'"),
        (["gate", "reference", "--data", "no.jsonl"], "cannot read the prompts 'no.jsonl'"),
        (["gate", "reference", "--min-agreement", "3"], "min_agreement=3.0 is not valid"),
        (["gate", "reference", "--max-kl", "-1"], "max_kl=-1.0 is not valid"),
        (["gate", "reference", "--budget", "2"], "budgets=(2.0,) is not valid"),
        (["gate", "reference", "--family", "two"], "family='two' is not valid"),
        (["gate", "reference", "--count", "many"], "--count"),
        (["gate", "reference", "--exact-returns", "-1"], "--exact-returns"),
        (["gate"], "Missing argument"),
    ],
)
def test_errors_are_status_1(arguments: list[str], message: str) -> None:
    """Status 2 says that no budget passed."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.output


def test_bad_lines_of_data(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    for text, message in [("{", "not JSON"), ("[]", "expected an object"), ("", "no two prompts")]:
        path.write_text(text)
        result = CliRunner().invoke(app, ["gate", "reference", "--data", str(path)])
        assert result.exit_code == 1
        assert message in result.stderr


def test_replayed_prompts() -> None:
    """Cases of a file share prompts; each is replayed once, the donor first."""
    donor, first, second, alone, other = (Prompt(text, (), "a") for text in "dfsao")
    cases = [Case("x", donor, first, (second,)), Case("x", donor, second, (first,)), Case("x", alone, other)]
    assert replayed(cases) == [donor, second, first, alone, other]
