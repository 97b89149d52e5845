"""The training of the decoder: the model, its optimizers and what it has learnt."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from examples.train_reference_vlm.training import BatchMaker, initialise
from vlcache_fx.testing.hybrid_vlm import load_model
from vlcache_fx.testing.reference_vlm.processor import ReferenceProcessor
from vlcache_fx.testing.reference_vlm.scans import load_scans
from vlcache_fx.testing.reference_vlm.vocabulary import vocabulary

REPORT_S, SAVE_S = 10.0, 40.0


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
        numbers = f"{step_ms:.1f} ms, loss {float(found.answers):.3f}"
        print(f"{share:.1%} step {self.made}, {numbers}; {', '.join(kinds)}", flush=True)

    def save(self, output: Path) -> None:
        """Write model and processor."""
        settings = self.model.generation_config
        settings.pad_token_id, settings.eos_token_id = self.words["<|pad|>"], self.words["<|im_end|>"]
        settings.do_sample, settings.max_new_tokens = False, 8
        self.model.save_pretrained(output)
        ReferenceProcessor().save_pretrained(output)
