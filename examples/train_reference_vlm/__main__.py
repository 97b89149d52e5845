"""Train the reference model that ships in ``vlcache_fx.testing.reference_vlm`` from scratch, and evaluate it.

    python -m examples.train_reference_vlm --output /tmp/reference

1. Train the vision encoder to return the sum of three fixed codes per token: of digit, row and column. Then
   freeze it.
2. Train the decoder to answer on grids of 2 to 5 rows, with short sequences. One attention head is also
   guided to the relevant tokens.
3. Grids grow to 10 to 12 rows, which is 100 to 120 vision tokens per picture; the guidance fades out.

Training uses the train scans, the evaluation the test scans.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.train_reference_vlm.config import reference_config
from examples.train_reference_vlm.training import (
    BatchMaker,
    Guide,
    Recipe,
    answer_loss,
    encoder_loss,
    initialise,
    token_codes,
)
from vlcache_fx.testing.reference_vlm import FAMILIES, accuracy, answer_questions, load_model, make_questions
from vlcache_fx.testing.reference_vlm.data import MAX_SYSTEM_WORDS
from vlcache_fx.testing.reference_vlm.images import MAX_ROWS, MIN_ROWS
from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor
from vlcache_fx.testing.reference_vlm.vocabulary import vocabulary

# Each stage: share of the steps at its end, rows, most system words, conversations (question after, before).
STAGES = (
    (0.4, (2, 5), 20, 24, 64),
    (0.6, (3, MAX_ROWS), MAX_SYSTEM_WORDS, 15, 40),
    (1.1, (MIN_ROWS, MAX_ROWS), MAX_SYSTEM_WORDS, 12, 30),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for weights, processor and evaluation.json"
    )
    parser.add_argument("--steps", type=int, default=6500, help="steps of the decoder")
    parser.add_argument(
        "--encoder-steps", type=int, default=None, help="steps of the vision encoder (3/13 of --steps)"
    )
    parser.add_argument(
        "--questions", type=int, default=None, help="evaluation questions per kind (400, or --steps)"
    )
    parser.add_argument(
        "--resume", type=Path, default=None, help="continue from this folder's model, on full grids"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the decoder")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def recipes(share: float) -> tuple[Recipe, ...]:
    """The kinds of batches at ``share`` (0..1) of the training, in the order in which they take turns."""
    _, rows, system_words, after, before = next(stage for stage in STAGES if share < stage[0])
    sizes: Any = {"rows": rows, "system_words": system_words}
    count = Recipe(("count",), False, after, 12, **sizes)
    find = Recipe(("cell", "where"), False, after, 12, **sizes)
    mixed = Recipe(("cell", "count", "count", "where"), True, before, 1, **sizes)
    same = Recipe(("same",), False, after * 2 // 3, 12, **sizes)
    same_before = Recipe(("same",), True, before * 5 // 8, 1, **sizes)
    return (find, count, mixed, same, count, find, count, mixed, same_before)


class Trainer:
    """The model, its optimizers and the batches."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.device, self.words = torch.device(options.device), vocabulary()
        model: Any
        if options.resume is None:
            model = Qwen2_5_VLForConditionalGeneration(reference_config(len(self.words), self.words))
            initialise(model)
        else:
            model = load_model(folder=options.resume)
            model.model.visual.requires_grad_(False)
        self.model = model.to(self.device).train()
        self.batches = BatchMaker(self.words, options.seed)
        self.checkpoints: Path = options.output
        self.start: float = 0.0 if options.resume is None else 0.6
        self.rate: float = options.rate
        self.seed: int = options.seed

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the training device."""
        return {name: value.to(self.device) for name, value in batch.items()}

    def forward_type(self) -> torch.autocast:
        """Multiply in bfloat16, keep weights in float32."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def step(self, loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
        """One update; ``share`` 0..1 scales the learning rates."""
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = share * group.setdefault("peak", group["lr"])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()

    def train_encoder(self, steps: Iterable[int], total: int) -> None:
        """Train the vision encoder to encode the content of each token, then freeze it."""
        tower = self.model.model.visual
        codes = token_codes(self.seed).to(self.device)
        optimizer = torch.optim.AdamW(tower.parameters(), lr=2e-3, weight_decay=0.05)
        for step in steps:
            batch = self.to_device(self.batches.encoder_batch(8))
            with self.forward_type():
                loss = encoder_loss(self.model, codes, batch)
            self.step(loss, [optimizer], schedule(step, total))
        tower.requires_grad_(False)

    def train_decoder(self, steps: Iterable[int], total: int) -> None:
        """Train the decoder to answer: small grids first, with guidance that fades out on full grids."""
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in named if weight.ndim == 2 and "layers" in name]
        others = [weight for name, weight in named if weight.ndim != 2 or "layers" not in name]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=self.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        guide = Guide(self.model)
        recent: dict[str, float] = {}
        for step in steps:
            share = self.start + (1.0 - self.start) * step / total
            kinds = recipes(share)
            recipe = kinds[step % len(kinds)]
            batch = self.to_device(self.batches.batch(recipe))
            with self.forward_type():
                loss, right = answer_loss(self.model, batch)
            weight = min(1.0, 9.0 - 10.0 * share)
            if weight > 0.0:
                loss = loss + weight * guide.loss(batch)
            self.step(loss, optimizers, schedule(step, total))
            name = f"{'+'.join(recipe.families)} {'before' if recipe.question_first else 'after'}"
            recent[name] = 0.8 * recent.get(name, float(right)) + 0.2 * float(right)
            if (step + 1) % 50 == 0:
                print(step + 1, {key: round(value, 3) for key, value in recent.items()}, flush=True)
            if (step + 1) % 200 == 0:
                self.save(self.checkpoints)
        guide.remove()

    def save(self, output: Path) -> None:
        """Write model and processor."""
        settings = self.model.generation_config
        settings.pad_token_id, settings.eos_token_id = self.words["<|pad|>"], self.words["<|im_end|>"]
        settings.do_sample, settings.max_new_tokens = False, 8
        self.model.save_pretrained(output)
        ReferenceProcessor().save_pretrained(output)


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate: 5 % warm-up (at most 50 steps), then a cosine down to 2 %."""
    warm = max(1, min(50, total // 20))
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.49 * (1.0 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def evaluate(model: Any, questions: int) -> dict[str, dict[str, float]]:
    """Accuracy on held-out scans by greedy generation, per family, question after and before the pictures."""
    processor = ReferenceProcessor()
    table: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        table[family] = {}
        for place, first in (("after", False), ("before", True)):
            asked = make_questions("test", family, questions, seed=1, question_first=first)
            table[family][place] = accuracy(answer_questions(model, processor, asked), asked)
    return table


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save and evaluate; return the content of ``evaluation.json``."""
    options, started = parse(argv), time.perf_counter()
    encoder_steps = options.encoder_steps or max(1, options.steps * 3 // 13)
    questions = options.questions or min(400, options.steps)
    trainer = Trainer(options)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        if options.resume is None:
            trainer.train_encoder(bar.track(range(encoder_steps), description="vision tower"), encoder_steps)
        trainer.train_decoder(bar.track(range(options.steps), description="decoder"), options.steps)
    trained = time.perf_counter() - started
    trainer.model.eval()
    trainer.save(options.output)
    report = {
        "accuracy": evaluate(trainer.model, questions),
        "questions_per_kind": questions,
        "evaluation_seed": 1,
        "training_seed": options.seed,
        "steps": {"vision tower": encoder_steps, "decoder": options.steps},
        "training_seconds": round(trained),
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "machine": machine(trainer.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["accuracy"], indent=2))
    return report


def machine(device: torch.device) -> str:
    """Describe the machine of the training."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
