"""Properties of every family of cases."""

from types import SimpleNamespace

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.questions import FAMILIES, make_cases, make_prompt, one_item_questions
from vlcache_fx.testing import reference_vlm


def system_words(text: str) -> list[str]:
    return text.split("<|im_start|>system\n")[1].split("<|im_end|>")[0].split()


@pytest.mark.parametrize("family", FAMILIES)
def test_make_cases_families(family: str) -> None:
    cases = make_cases(reference_vlm, family, 4)
    assert len(cases) == 4
    for case in cases:
        donor, asked = case.donor, case.asked
        assert asked.images is donor.images
        assert len(donor.images) == (2 if family == "multi_hop" else 1)
        first = asked.text.index("?") < asked.text.index("<|image_pad|>")
        assert first == (family == "question_first")
        before, now = system_words(donor.text), system_words(asked.text)
        assert (before == now) == (family == "asked_again")
        if family == "system_prompt":
            assert len(before) == len(now)
        if family == "position_shift":
            assert len(now) > len(before) + 50
    again = make_cases(reference_vlm, family, 4)
    assert [case.asked.text for case in again] == [case.asked.text for case in cases]


def test_make_cases_unknown_family() -> None:
    with pytest.raises(
        OptionError, match=r"family='two_hop' is not valid: it must be one of single_hop, .*asked_again"
    ):
        make_cases(reference_vlm, "two_hop", 1)


def test_skipped_questions_are_those_of_a_smaller_count() -> None:
    def texts(count: int, skip: int = 0) -> list[str]:
        return [question.text for question in one_item_questions(reference_vlm, "test", count, 1, skip)]

    kinds = len(reference_vlm.FAMILIES) - 1  # without "same"
    first, rest, whole = texts(2 * kinds), texts(3 * kinds, 2 * kinds), texts(5 * kinds)
    for kind in range(kinds):
        own = first[2 * kind : 2 * kind + 2] + rest[3 * kind : 3 * kind + 3]
        assert own == whole[5 * kind : 5 * kind + 5]


def test_make_prompt_answer_format() -> None:
    source = SimpleNamespace(
        build_prompt=lambda question: question.text, answer_text=lambda answer: f" {answer}"
    )
    question = SimpleNamespace(text="what is it ?", images=(), answer="cat")
    assert make_prompt(source, question).answer == " cat"  # type: ignore[arg-type]
