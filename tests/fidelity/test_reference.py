"""Comparison and calibration of the reference model, in one file to compile it once."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import vlcache_fx
from vlcache_fx.cli import app
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.calibrate import SHARES, calibrate
from vlcache_fx.fidelity.donor_study import KINDS, results_table, study
from vlcache_fx.fidelity.plot import plot_scores
from vlcache_fx.fidelity.prompts import Prompt
from vlcache_fx.fidelity.questions import make_cases
from vlcache_fx.fidelity.run import ALL, Setting, run, settings
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.subspace_study import PROMPTS, Combination
from vlcache_fx.fidelity.subspace_study import results_table as subspace_table
from vlcache_fx.fidelity.subspace_study import study as study_subspaces
from vlcache_fx.fidelity.table import calibration_table
from vlcache_fx.policies import Profile
from vlcache_fx.testing import reference_vlm


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = vlcache_fx.compile(
        reference_vlm.load_model(), lowering="eager", dynamic=True, strict=True, donor_rank=32
    )
    return Subject("reference", model, reference_vlm.load_processor(), positions=1)


def test_run_reference_model(subject: Subject, tmp_path: Path) -> None:
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
    # Equal to the unmodified model at every token; only shapes of kernels may differ.
    assert by_policy["full"].kl.mean < 1e-9
    assert by_policy["full"].agreement.mean == 1.0
    assert 0.05 < by_policy["uniform"].recomputed < 0.1 + 1e-9
    assert by_policy["full"].accuracy == by_policy["full"].exact_accuracy
    plot_scores(scores, "reference", "a machine", tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 10_000


def test_subject_exact_equals_unmodified_model(subject: Subject) -> None:
    question = subject.prepare([make_cases(reference_vlm, "single_hop", 1)[0].asked])
    with torch.no_grad():
        plain = reference_vlm.load_model()(**question.inputs).logits[:, -2:-1]
    torch.testing.assert_close(subject.exact(question), plain)


def test_prepare_bad_answer(subject: Subject) -> None:
    prompt = make_cases(reference_vlm, "single_hop", 1)[0].asked
    with pytest.raises(OptionError, match="has 2 tokens: it must have 1 to 1"):
        subject.prepare([dataclasses.replace(prompt, answer="yes no")])
    with pytest.raises(OptionError, match="has 0 tokens"):
        subject.prepare([Prompt(prompt.text, prompt.images, "")])


def test_run_nothing_to_compare(subject: Subject) -> None:
    with pytest.raises(OptionError, match="0 cases, 1 settings"):
        run(subject, [], [Setting("none", 0.0)])
    with pytest.raises(OptionError, match=r"Linear was not compiled with vlcache_fx\.compile"):
        Subject("linear", nn.Linear(1, 1), None)


def test_calibrate_reference_model(subject: Subject) -> None:
    cases = make_cases(reference_vlm, "system_prompt", 6, split="train")
    found = calibrate(subject, cases, batch=4)
    profile = found.profile
    assert len(profile.sensitivities) == 6
    assert profile.misfits(profile.model_fingerprint, "float32") is None
    assert [share for share, _ in profile.error_curve] == [0.0, *SHARES, 1.0]
    errors = [error for _, error in profile.error_curve]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0
    assert found.by_depth[0][0] == 0
    assert found.by_depth[-1][0] == 6
    assert found.prompts == (4, 2)
    assert found.is_flat == (len(set(profile.sensitivities)) == 1)


def test_calibrate_donors_of_several_contexts(subject: Subject) -> None:
    cases = make_cases(reference_vlm, "system_prompt", 3, split="train", contexts=3)
    found = calibrate(subject, cases, batch=4, contexts=(3, 2), donor_ranks=(8, 0))
    assert [donor[:2] for donor in found.by_donor] == [(1, 0), (2, 0), (2, 8), (3, 0), (3, 8)]
    assert len({error for *_, error in found.by_donor}) == 5  # donors differ
    profile, (count, rank) = found.profile, found.donor
    assert [contexts for contexts, _ in profile.curves_by_contexts] == [2, 3]
    assert profile.donor_rank == rank
    errors = {donor[:2]: donor[2] for donor in found.by_donor}
    assert errors[count, rank] <= 1.1 * min(errors.values())
    assert dict(profile.for_contexts(3).error_curve)[0.02] == errors[3, rank]
    assert subject.engine.options.donor_contexts == 4  # the engine's options are as before
    assert calibration_table(found).row_count == len(SHARES) + 2 + 7 + 6 + 5


def test_too_few_prompts_of_an_image(subject: Subject) -> None:
    cases = make_cases(reference_vlm, "system_prompt", 3, split="train", contexts=2)
    with pytest.raises(OptionError, match="contexts=4: there are prompts for 2 contexts of an image"):
        calibrate(subject, cases, contexts=(4,))


def test_settings_of_donors() -> None:
    chosen = settings(("uniform",), (0.02,), contexts=(1, 4), donor_ranks=(0, 16))
    assert [(one.contexts, one.donor_rank) for one in chosen] == [(1, 0), (4, 0), (4, 16)]
    assert [one.label for one in chosen] == [
        "uniform", "uniform, 4 contexts", "uniform, 4 contexts, rank 16",
    ]  # fmt: skip


def test_calibrate_bad_arguments(subject: Subject) -> None:
    cases = make_cases(reference_vlm, "single_hop", 3)
    with pytest.raises(OptionError, match="at least 3 cases, not 2"):
        calibrate(subject, cases[:2])
    with pytest.raises(OptionError, match="depth_share=2 is not valid"):
        calibrate(subject, cases, depth_share=2)


def test_commands_calibrate_then_fidelity(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vlcache_fx.fidelity.models.load_subject", lambda *_: subject
    )  # compiled once for this file
    profile, output = tmp_path / "new" / "profile.json", tmp_path / "out"
    arguments = ["--family", "single_hop", "--count", "3"]
    made = CliRunner().invoke(
        app, ["calibrate", "reference", *arguments, "--contexts", "2", "--output", str(profile)]
    )
    assert made.exit_code == 0, made.output
    assert len(Profile.load(profile).sensitivities) == 6
    assert "Nearly the best donor: " in made.output
    again = CliRunner().invoke(
        app, ["calibrate", "reference", *arguments, "--output", str(profile), "--json"]
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == json.loads(profile.read_text())
    assert str(profile) in made.output.replace("\n", "")
    chosen = ["--policy", "layer_aware", "--budget", "0.02", "--profile", str(profile)]
    compared = CliRunner().invoke(
        app, ["fidelity", "reference", *arguments, *chosen, "--output-dir", str(output)]
    )
    assert compared.exit_code == 0, compared.output
    assert "layer_aware" in compared.output
    as_json = CliRunner().invoke(
        app, ["fidelity", "reference", *arguments, *chosen, "--output-dir", str(output), "--json"]
    )
    assert as_json.exit_code == 0, as_json.output
    assert json.loads(as_json.stdout) == json.loads((output / "fidelity.json").read_text())
    record = json.loads((output / "fidelity.json").read_text())
    assert {(one["policy"], one["family"], one["prompts"]) for one in record["scores"]} == {
        ("layer_aware", "single_hop", 3), ("layer_aware", "all", 3)
    }  # fmt: skip
    assert (output / "fidelity.png").exists()
    assert (output / "fidelity.md").read_text().count("| layer_aware |") == 2


def test_study_every_kind_of_donor(subject: Subject) -> None:
    found = study(subject, reference_vlm, 4, batch=4)
    assert list(found) == list(KINDS)
    assert {kind: len(comparisons) for kind, comparisons in found.items()} == dict.fromkeys(KINDS, 4)
    # Errors differ: a donor that was not stored would make two kinds equal.
    errors = [tuple(one.kl for one in found[kind]) for kind in ("one", "mean of 2", "mean of 4", "typical")]
    assert len(set(errors)) == 4
    first, second = (sum(one.kl for one in found[f"rank {rank} patch"]) for rank in (1, 8))
    assert first > second > 0
    assert results_table(found, "a title").row_count == len(KINDS)


def test_study_donors_of_several_contexts(subject: Subject) -> None:
    combinations = (
        Combination(1),
        Combination(3),
        Combination(3, None),
        Combination(3, 4),
    )
    found, shares = study_subspaces(subject, reference_vlm, 2, (0.05,), combinations=combinations, batch=2)
    assert list(shares) == list(combinations)
    assert [shares[combination] for combination in combinations[:3]] == [1.0, 1.0, 3.0]
    assert 1 < shares[combinations[3]] < 3
    assert {key: len(own) for key, own in found.items()} == {
        (combination, 0.05, name): 2 for combination in combinations for name in PROMPTS
    }
    # Errors differ: a donor that was not stored would make two combinations equal.
    errors = [
        tuple(one.kl for name in PROMPTS for one in found[combination, 0.05, name])
        for combination in combinations
    ]
    assert len(set(errors)) == len(combinations)
    table = subspace_table(found, shares, "a title")
    assert table.row_count == len(combinations)
    (closer,) = (list(column.cells) for column in table.columns if column.header == "closer")
    wins = sum(other < one for one, other in zip(errors[0], errors[1], strict=True))
    assert closer[0] == ""
    assert str(closer[1]).startswith(f"{100 * wins / len(errors[0]):.1f} % (")
