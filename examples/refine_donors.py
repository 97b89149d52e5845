"""How much donors gain when they are the mean over several contexts.

    python examples/refine_donors.py

The reference model is asked about pictures of scanned digits. Each picture is computed exactly behind 1, 2 or
4 system prompts and questions, then reused behind others: KL divergence, in nats, of the next word's
distribution from that of the unmodified model, and how often the next word is the same.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.runtime.shadow import kl_per_row
from vlcache_fx.testing import reference_vlm
from vlcache_fx.testing.reference_vlm import FAMILIES, Question
from vlcache_fx.testing.reference_vlm.data import draw_question, draw_system_prompt

CONTEXTS = (1, 2, 4)
COMPARED = 3
"""Prompts per picture in which its donor is reused."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of contexts: prompts compared, their KL (nats), share of equal next words.

    Few prompts make most of the mean: look at the other figures before you believe it.
    """

    contexts: int
    prompts: int
    mean_kl: float
    median_kl: float
    p95_kl: float
    max_kl: float
    agreement: float


def questions_about(first: Question) -> Iterator[Question]:
    """Questions about the pictures of ``first``, before and after them, behind other system prompts."""
    rng = np.random.default_rng(first.scan_ids[0].reshape(-1))
    yield first
    while True:
        drawn = draw_question(rng, first.family, first.digits)
        yield dataclasses.replace(
            first,
            system_prompt=draw_system_prompt(rng),
            text=drawn.text,
            answer=drawn.answer,
            question_first=bool(rng.random() < 0.5),
        )


class Experiment:
    """The reference model twice, compiled for reuse and unmodified (both run eagerly)."""

    def __init__(self, budget: float) -> None:
        self.processor = reference_vlm.load_processor()
        self.unmodified = reference_vlm.load_model()
        # Shadow runs are what computes a picture exactly again; here they are to refine, not to judge.
        self.model = vlcache_fx.compile(
            reference_vlm.load_model(), budget=budget, lowering="eager", dynamic=True,
            donor_contexts=max(CONTEXTS), shadow=1.0, shadow_max_kl=None, shadow_max_violations=10**9,
        )  # fmt: skip
        self.engine = self.model.vlcache

    def next_word(self, model: torch.nn.Module, question: Question) -> Tensor:
        """Logits of the next word, [1, vocabulary]."""
        inputs = reference_vlm.prepare(self.processor, [question])
        with torch.no_grad():
            return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]

    def compare(self, asked: Sequence[Question], compared: Sequence[tuple[Question, Tensor]]) -> list[tuple]:
        """``(KL, same next word)`` of each ``compared``, when its pictures were computed behind ``asked``."""
        self.engine.clear()
        for question in asked:
            self.next_word(self.model, question)
        found = []
        for question, exact in compared:
            with self.engine.guards.off():
                reused = self.next_word(self.model, question)
            contexts = [span["donor_contexts"] for span in self.engine.last_report["spans"]]
            if min(contexts) < len(asked):
                raise RuntimeError(f"donors of {contexts} contexts, wanted {len(asked)}")
            same = bool(exact.argmax() == reused.argmax())
            found.append((float(kl_per_row(exact, reused)), same))
        return found


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run it with command-line ``arguments``; the rows that it prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=40, help="sets of pictures, over all families")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--budget", type=float, default=0.02)
    options = parser.parse_args(arguments)
    experiment = Experiment(options.budget)
    found: dict[int, list[tuple]] = {count: [] for count in CONTEXTS}
    share = -(-options.pictures // len(options.families))
    for family in options.families:
        for first in reference_vlm.make_questions("test", family, share):
            questions = questions_about(first)
            asked = [next(questions) for _ in range(max(CONTEXTS))]
            compared = [
                (question, experiment.next_word(experiment.unmodified, question))
                for question, _ in zip(questions, range(COMPARED), strict=False)
            ]
            for count in CONTEXTS:
                found[count] += experiment.compare(asked[:count], compared)
    print(f"budget {options.budget:g}; contexts | prompts | KL: mean | median | p95 | max | same next word")
    rows = []
    for count, results in found.items():
        kl, same = np.array([one for one, _ in results]), [one for _, one in results]
        spread = (kl.mean(), np.median(kl), np.quantile(kl, 0.95), kl.max())
        rows.append(Row(count, len(kl), *map(float, spread), sum(same) / len(same)))
        figures = " | ".join(f"{value:.2e}" for value in spread)
        print(f"{count} | {len(kl)} | {figures} | {rows[-1].agreement:.1%}")
    return rows


if __name__ == "__main__":
    main()
