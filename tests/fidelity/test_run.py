"""Policies and budgets compared on the reference model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.compare import Interval
from vlcache_fx.fidelity.plot import pareto, plot_scores
from vlcache_fx.fidelity.prompts import Prompt
from vlcache_fx.fidelity.questions import make_cases
from vlcache_fx.fidelity.run import ALL, Score, Setting, run, settings
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.testing import reference_vlm


def test_settings_share_the_ends() -> None:
    chosen = settings(["uniform", "first_k"], (0.0, 0.1, 1.0))
    assert [(one.name, one.budget) for one in chosen] == [
        ("none", 0.0), ("uniform", 0.1), ("first_k", 0.1), ("full", 1.0)
    ]  # fmt: skip


def test_scores_of_the_reference_model(subject: Subject, tmp_path: Path) -> None:
    cases = [
        case for family in ("system_prompt", "multi_hop") for case in make_cases(reference_vlm, family, 3)
    ]
    done: list[int] = []
    scores = run(subject, cases, settings(["uniform"], (0.0, 0.1, 1.0)), batch=2, after_batch=done.append)
    assert done == [2, 1, 2, 1]
    assert {(one.policy, one.family): one.prompts for one in scores} == {
        (policy, family): count
        for policy in ("none", "uniform", "full")
        for family, count in (("system_prompt", 3), ("multi_hop", 3), (ALL, 6))
    }
    by_policy = {one.policy: one for one in scores if one.family == ALL}
    assert by_policy["none"].kl.mean > 0
    assert by_policy["none"].recomputed == 0.0
    # As the unmodified model, token by token; only the shapes of the kernels may differ.
    assert by_policy["full"].kl.mean < 1e-9
    assert by_policy["full"].agreement.mean == 1.0
    assert 0.05 < by_policy["uniform"].recomputed < 0.1 + 1e-9
    assert by_policy["full"].accuracy == by_policy["full"].exact_accuracy
    plot_scores(scores, "reference", "a machine", tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_the_unmodified_model_is_the_oracle(subject: Subject) -> None:
    question = subject.prepare([make_cases(reference_vlm, "single_hop", 1)[0].asked])
    with torch.no_grad():
        plain = reference_vlm.load_model()(**question.inputs).logits[:, -2:-1]
    torch.testing.assert_close(subject.exact(question), plain)


def test_an_answer_that_cannot_be_compared(subject: Subject) -> None:
    prompt = make_cases(reference_vlm, "single_hop", 1)[0].asked
    with pytest.raises(OptionError, match="has 2 tokens: it must have 1 to 1"):
        subject.prepare([dataclasses.replace(prompt, answer="yes no")])
    with pytest.raises(OptionError, match="has 0 tokens"):
        subject.prepare([Prompt(prompt.text, prompt.images, "")])


def test_nothing_to_compare(subject: Subject) -> None:
    with pytest.raises(OptionError, match="0 cases, 1 settings"):
        run(subject, [], [Setting("none", 0.0)])
    with pytest.raises(OptionError, match=r"Linear was not compiled with vlcache_fx\.compile"):
        Subject("linear", nn.Linear(1, 1), None)


def test_the_pareto_front() -> None:
    certain = Interval(1.0, 1.0, 1.0)

    def score(recomputed: float, kl: float) -> Score:
        return Score("p", 0.1, ALL, 1, recomputed, certain, certain, certain, Interval(kl, kl, kl))

    worst, cheap, good, dominated = score(0.0, 3.0), score(0.1, 2.0), score(0.3, 1.0), score(0.2, 2.5)
    assert pareto([good, dominated, cheap, worst]) == [worst, cheap, good]
