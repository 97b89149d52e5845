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
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3_5ForConditionalGeneration

from examples.train_hybrid_vlm.batches import (
    Clock,
    conversations_of,
    finish,
    load_batches,
    to_device,
)
from examples.train_hybrid_vlm.config import hybrid_config
from examples.train_hybrid_vlm.conversations import KINDS, make_batch, recipes
from examples.train_hybrid_vlm.decoder import Losses, initialise_recurrent
from examples.train_hybrid_vlm.optimizers import BatchedMuon
from examples.train_hybrid_vlm.pictures import Pictures
from examples.train_hybrid_vlm.steps import Steps
from examples.train_hybrid_vlm.tower import TOWER_FILE, load_tower, save_tower, train_tower
from examples.train_reference_vlm.__main__ import machine
from examples.train_reference_vlm.training import BatchMaker, initialise
from vlcache_fx.testing.hybrid_vlm import FAMILIES, accuracy, answer_questions, load_model, make_questions
from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor
from vlcache_fx.testing.reference_vlm.scans import load_scans
from vlcache_fx.testing.reference_vlm.vocabulary import vocabulary

REPORT_S, SAVE_S = 10.0, 40.0


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


def schedule(share: float) -> float:
    """Share of the peak learning rate: 3 % warm-up, then a cosine down to 2 %."""
    warm = 0.03
    if share < warm:
        return max(0.01, share / warm)
    return 0.02 + 0.49 * (1.0 + math.cos(math.pi * (share - warm) / (1.0 - warm)))


def guide_weight(share: float) -> float:
    """Weight of the guidance: 1 at first, fading out between 80 % and 90 %."""
    return max(0.0, min(1.0, 9.0 - 10.0 * share))


class Trainer:
    """The model, its optimizers and what it has learnt."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device, self.words = options, torch.device(options.device), vocabulary()
        model: Any
        if options.resume is None:
            model = Qwen3_5ForConditionalGeneration(hybrid_config(len(self.words), self.words))
            initialise(model)
            initialise_recurrent(model)
        else:
            model = load_model(folder=options.resume)
        self.model = model.to(self.device).train()
        self.precision = torch.float32 if options.float32 else torch.bfloat16
        self.right = torch.zeros(3, len(KINDS) + 1, device=self.device)
        self.made = 0

    def prepare_tower(self) -> bool:
        """Read the tower, or train it, and freeze it; return whether it was trained."""
        folder, new = self.options.tower, False
        if self.options.resume is None:
            new = not (folder / TOWER_FILE).exists()
            if new:
                batches = BatchMaker(self.words, self.options.seed)
                train_tower(self.model, batches, self.options.tower_steps, self.options.seed)
                save_tower(self.model, folder)
            else:
                load_tower(self.model, folder)
        self.model.model.visual.requires_grad_(False)
        return new

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of layers, AdamW for the rest."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        matrices = {
            name: weight
            for name, weight in named
            if weight.ndim == 2 and "layers" in name and "in_proj_a" not in name and "in_proj_b" not in name
        }
        others = [weight for name, weight in named if name not in matrices]
        rate, fused = self.options.rate, self.device.type == "cuda"
        return [
            BatchedMuon(list(matrices.values()), lr=rate, weight_decay=0.01),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=fused),
        ]

    def train(self, until: float) -> None:
        """Train the decoder until ``time.time()`` is ``until``."""
        options = self.options
        pictures = Pictures(self.model.model.visual, load_scans("train"), options.seed)
        steps = Steps(self.model, self.precision, self.device.type == "cuda" and not options.no_cuda_graphs)
        optimizers = self.optimizers()
        if steps.graphs:
            self.warm_up(steps, pictures)
        clock = Clock(time.time(), max(1e-3, until - time.time()), options.begin)
        reported = saved = time.time()
        reported_at = 0
        for arrays in load_batches(clock, options.tokens, options.seed, options.workers):
            share = clock.share()
            batch = finish(to_device(arrays, self.device), pictures, guide_weight(share), self.precision)
            kind = batch.pop("kind")
            found = steps.run(batch)
            self.update(steps, optimizers, schedule(share))
            self.count(kind, found)
            self.made += 1
            now = time.time()
            if now - reported > REPORT_S:
                self.report(share, 1000.0 * (now - reported) / (self.made - reported_at), found)
                reported, reported_at = now, self.made
            if now - saved > SAVE_S:
                self.save(options.output)
                saved = time.time()
            if time.time() > until:
                break

    def warm_up(self, steps: Steps, pictures: Pictures) -> None:
        """Capture a graph of each shape."""
        started, rng = time.time(), np.random.default_rng(0)
        shapes = {recipe.shape: recipe for share in (1.0, 0.5, 0.0) for recipe in recipes(share)}
        for recipe in sorted(shapes.values(), key=lambda one: -one.length):
            count = conversations_of(recipe, self.options.tokens)
            arrays = make_batch(self.words, rng, load_scans("train"), recipe, count)
            batch = finish(to_device(arrays, self.device), pictures, 1.0, self.precision)
            batch.pop("kind")
            steps.run(batch)
            print(f"{recipe.shape}: {count} rows, {time.time() - started:.1f} s", flush=True)

    def update(self, steps: Steps, optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
        """One update; ``share`` 0..1 scales the learning rates."""
        torch.nn.utils.clip_grad_norm_(steps.weights, 1.0, foreach=True)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * self.options.rate
            optimizer.step()

    def count(self, kind: torch.Tensor, found: Losses) -> None:
        """Add right answers, questions and the guide's divergence of each kind."""
        kinds, right = kind.flatten().long(), found.right.flatten().float()
        self.right[0].index_add_(0, kinds, right)
        self.right[1].index_add_(0, kinds, torch.ones_like(right))
        self.right[2].index_add_(0, kinds, found.guide.expand_as(right))

    def report(self, share: float, step_ms: float, found: Losses) -> None:
        """Print a line, and begin to count anew."""
        counts = zip(KINDS, *self.right[:, :-1].tolist(), strict=True)
        kinds = [f"{name} {a / b:.3f} (guide {c / b:.2f})" for name, a, b, c in counts if b]
        self.right.zero_()
        print(
            f"{share:.1%} step {self.made}, {step_ms:.1f} ms, loss {float(found.answers):.3f}; {', '.join(kinds)}",
            flush=True,
        )

    def save(self, output: Path) -> None:
        """Write model and processor."""
        settings = self.model.generation_config
        settings.pad_token_id, settings.eos_token_id = self.words["<|pad|>"], self.words["<|im_end|>"]
        settings.do_sample, settings.max_new_tokens = False, 8
        self.model.save_pretrained(output)
        ReferenceProcessor().save_pretrained(output)


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
