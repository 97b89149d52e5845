"""Random requests about recurring images, reproducible by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vlcache_fx.testing.families import llava_inputs, tiny_llava
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

MODELS = ("tiny", "llava")
POLICIES = ("layer_aware", "uniform", "first_k", "none", "cacheblend")
BUDGETS = (0.0, 0.02, 0.1, 0.5)
SALTS = ("", "tenant-1", "tenant-2")
IMAGES = 5
"""Number of different images."""
PROMPTS_PER_MODEL = 24


@dataclass(frozen=True)
class Prompt:
    """A prompt of one model.

    Attributes:
        model: one of ``MODELS``.
        before, after: text tokens before the first and after the last image.
        images: seed of each image.
        text_seed: seed of the text.
    """

    model: str
    before: int
    after: int
    images: tuple[int, ...]
    text_seed: int

    def inputs(self) -> dict[str, Any]:
        """Return the model's keyword arguments."""
        if self.model == "llava":
            return llava_inputs(self.before, self.after, self.images, text_seed=self.text_seed)
        # The length belongs to the image: one image has one number of tokens.
        images = [(18 + 4 * seed, seed) for seed in self.images]
        return tiny_vlm_inputs(self.before, self.after, images, text_seed=self.text_seed)


@dataclass(frozen=True)
class Call:
    """A prompt with the settings of its call.

    Attributes:
        prompt: the prompt.
        policy, budget, salt: options of the call.
        clears: drop entries before the call: all of them, those of its salt, or none.
        reopens: close the store before the call, and open it again.
    """

    prompt: Prompt
    policy: str
    budget: float
    salt: str
    clears: str = ""
    reopens: bool = False


def build_model(name: str) -> Any:
    """Build one of ``MODELS``, with weights that all processes share."""
    return tiny_llava(2) if name == "llava" else tiny_vlm(num_layers=3, hidden=32, last_only=False)


def make_pool(seed: int, models: Sequence[str] = MODELS) -> tuple[Prompt, ...]:
    """Return the prompts of a run: few enough that images, texts and whole prompts recur."""
    pool = []
    for model in models:
        draw = random.Random(f"pool-{model}-{seed}")  # noqa: S311 - no secret
        for _ in range(PROMPTS_PER_MODEL):
            images = tuple(draw.randrange(IMAGES) for _ in range(draw.choice((1, 1, 1, 2))))
            before, after = draw.randrange(0, 20), draw.randrange(2, 12)
            pool.append(Prompt(model, before, after, images, draw.randrange(4)))
    return tuple(pool)


def draw_calls(
    pool: tuple[Prompt, ...], label: str, full_share: float, clear_share: float, reopen_share: float
) -> Iterator[Call]:
    """Yield calls for ever; equal arguments give equal calls.

    Args:
        pool: the prompts.
        label: names the thread that makes the calls.
        full_share, clear_share, reopen_share: as in ``StressSettings``.
    """
    draw = random.Random(label)  # noqa: S311 - no secret
    while True:
        is_full = draw.random() < full_share
        policy = "full" if is_full else draw.choice(POLICIES)
        call = Call(draw.choice(pool), policy, draw.choice(BUDGETS), draw.choice(SALTS))
        clears = draw.choice(("all", "salt")) if draw.random() < clear_share else ""
        yield Call(call.prompt, call.policy, call.budget, call.salt, clears, draw.random() < reopen_share)
