"""Train the hybrid model that ships in ``vlcache_fx.testing.hybrid_vlm`` from scratch, and evaluate it.

    python -m examples.train_hybrid_vlm --tower-only --tower /tmp/tower
    python -m examples.train_hybrid_vlm --tower /tmp/tower --output /tmp/hybrid --seconds 230

1. The vision tower learns to return the sum of three fixed codes per token, as that of the reference model;
   minutes on a CPU. It is written to ``--tower``, or read from there.
2. The decoder learns to answer, within ``--seconds`` of wall time: small grids first, with one attention head
   guided to the relevant tokens; then full grids, and the guidance fades out.

Training uses the train scans, the evaluation the test scans. On a GPU, steps are CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.train_hybrid_vlm.trainer import Trainer
from examples.train_reference_vlm.__main__ import machine
from vlcache_fx.testing.hybrid_vlm import FAMILIES, accuracy, answer_questions, make_questions
from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, help="folder for weights, processor and evaluation.json")
    parser.add_argument(
        "--tower", type=Path, required=True, help="folder of the tower: read, or written anew"
    )
    parser.add_argument("--tower-steps", type=int, default=4500, help="steps of a new tower")
    parser.add_argument("--tower-only", action="store_true", help="stop when the tower is trained")
    parser.add_argument("--seconds", type=float, default=230.0, help="wall time of decoder and evaluation")
    parser.add_argument(
        "--evaluation-seconds", type=float, default=25.0, help="part of it that is kept for the evaluation"
    )
    parser.add_argument("--questions", type=int, default=48, help="evaluation questions per kind")
    parser.add_argument("--resume", type=Path, default=None, help="continue from this folder's model")
    parser.add_argument("--begin", type=float, default=0.0, help="share (0..1) of the training to begin at")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 3)) if cuda else 0
    )
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 4096, help="tokens of a step")
    parser.add_argument("--float32", action="store_true", help="multiply in float32, not in bfloat16")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="run steps eagerly")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.output is None and not options.tower_only:
        parser.error("--output is needed")
    return options


def evaluate(model: Any, questions: int, until: float) -> dict[str, dict[str, float]]:
    """Accuracy on held-out scans, per family and place of the question; none is begun after ``until``."""
    processor = ReferenceProcessor()
    table: dict[str, dict[str, float]] = {family: {} for family in FAMILIES}
    for place, first in (("after", False), ("before", True)):
        for family in FAMILIES:
            if time.time() < until:
                asked = make_questions("test", family, questions, seed=1, question_first=first)
                answers = answer_questions(model, processor, asked, batch=questions)
                table[family][place] = round(accuracy(answers, asked), 4)
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save and evaluate; return the content of ``evaluation.json``."""
    options, started = parse(argv), time.time()
    trainer = Trainer(options)
    if trainer.prepare_tower():
        started = time.time()
    if options.tower_only:
        return {}
    trainer.train(started + max(0.0, options.seconds - options.evaluation_seconds))
    trained = time.time() - started
    trainer.model.eval()
    trainer.save(options.output)
    report = {
        "accuracy": evaluate(trainer.model, options.questions, started + options.seconds - 5.0),
        "questions_per_kind": options.questions,
        "evaluation_seed": 1,
        "training_seed": options.seed,
        "steps": {"decoder": trainer.made},
        "training_seconds": round(trained),
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "machine": machine(trainer.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2), flush=True)
    return report


if __name__ == "__main__":
    main()
