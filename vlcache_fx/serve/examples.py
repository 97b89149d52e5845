"""First requests, which compile a model's programs before clients wait for them."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from transformers.cli.serving.utils import Modality

from vlcache_fx.errors import OptionError
from vlcache_fx.serve.batching import Batcher
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.exchange import Exchange
from vlcache_fx.serve.media import MediaLoader, data_url
from vlcache_fx.serve.models import ServedModels
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.prompt import build_inputs
from vlcache_fx.serve.request import RequestSettings
from vlcache_fx.serve.sampling import set_sampling
from vlcache_fx.serve.state import RequestManager

log = logging.getLogger("vlcache_fx.serve")

SIDES = {"reference": (80, 80), "hybrid": (80, 80), "photo": (256, 256)}
"""Sizes of pictures that these models take."""
OTHER_SIDES = (224, 224)
NEW_TOKENS = 3
SALT = "vlcache-serve-examples"
PROMPTS = ("what is in the picture ?", "and what else ?", "and what else ?")
"""A new picture, a known one, and a known prompt."""
LEARNING, LEARNT = "what else is there ?", "is there more ?"
"""With the option ``donor_rank``: a known picture that is computed, and one whose donor is fitted. They
stand in front of it: in an exact prefix no donor learns."""
LARGEST_BATCH = 3
"""Programs for three prompts of different lengths serve any number above one."""


async def run_examples(name: str, models: ServedModels, batcher: Batcher, options: ServeOptions) -> None:
    """Let a loaded model answer examples, cold and warm, alone and in a batch. Their donors are dropped.

    Raises:
        OptionError: the model cannot answer them.
    """
    model, processor = models.load_model_and_processor(name)
    sides = SIDES.get(models.sources[name], OTHER_SIDES)
    sizes = sorted({1, min(options.batch_size, LARGEST_BATCH)})
    takes_pictures = models.get_model_modality(model, processor) is not Modality.LLM
    engine = model.vlcache
    given = engine.options
    prompts = (*PROMPTS, LEARNING, LEARNT) if given.donor_rank else PROMPTS
    try:
        for pictures, size, prompt in product((1, 0) if takes_pictures else (0,), sizes, prompts):
            engine.set_options(replace(given, exact_returns=int(prompt == LEARNING)))
            texts = [prompt + " please" * index for index in range(size)]
            # The pictures of the batch are new: its first run is a cold one.
            inputs = [
                await asyncio.to_thread(_inputs, name, models, sides, text, 10 * size + index, pictures)
                for index, text in enumerate(texts)
            ]
            begin = time.perf_counter()
            await _run(inputs, model, processor, batcher)
            kind = "with pictures" if pictures else "of text"
            log.info("%s: %d prompt(s) %s in %.1f s", name, size, kind, time.perf_counter() - begin)
    except RequestError as error:
        raise OptionError(f"the model {name!r} does not answer an example: {error.message}") from error
    finally:
        engine.set_options(given)
        engine.clear(salt=SALT)


def _inputs(
    name: str, models: ServedModels, sides: tuple[int, int], text: str, seed: int, pictures: int
) -> Any:
    model, processor = models.load_model_and_processor(name)
    picture = {"type": "image_url", "image_url": {"url": picture_url(sides, seed)}}
    content = [picture] * pictures + [{"type": "text", "text": text}]
    if text.startswith((LEARNING, LEARNT)):
        content.reverse()
    modality = models.get_model_modality(model, processor)
    media = MediaLoader(ServeOptions((name,)))
    messages = [{"role": "user", "content": content}]
    return build_inputs(messages, processor, modality, media).to(model.device)


async def _run(inputs: list[Any], model: Any, processor: Any, batcher: Batcher) -> None:
    jobs = []
    for prompt in inputs:
        config = copy.deepcopy(model.generation_config)
        config.max_new_tokens, config.eos_token_id = NEW_TOKENS, None
        set_sampling(config, 0.0)
        manager = RequestManager(batcher, RequestSettings(salt=SALT), Exchange(""))
        job = manager.job_for(processor, prompt, config)
        job.is_example = True
        jobs.append(job)
    batcher.submit(*jobs)
    for job in jobs:
        await job.finished


def picture_url(sides: tuple[int, int], seed: int) -> str:
    """A data URL of a picture of noise, ``width x height``."""
    from PIL import Image

    width, height = sides
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)
    return data_url(Image.fromarray(pixels))
