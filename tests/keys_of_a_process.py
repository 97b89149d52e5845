"""Prints the keys that this process records, as JSON: name of a model -> keys. Run by ``test_keys_travel``.

Usage: ``python keys_of_a_process.py FOLDER static|dynamic``. The first process saves a model in FOLDER,
others load it from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vlcache_fx
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

FOLDER, DYNAMIC = Path(sys.argv[1]), sys.argv[2] == "dynamic"

PROMPTS = {
    "tiny": (lambda seed: tiny_vlm_inputs(7, 5, [(20, seed)], text_seed=1)),
    "llava": (lambda seed: llava_inputs(4, 5, [seed], text_seed=1)),
    "qwen": (lambda seed: qwen_inputs(4, 5, [(8, 8, seed)], text_seed=1)),
}


def from_folder() -> Any:
    """Save a LLaVA once, load it in other processes."""
    if not FOLDER.exists():
        model = tiny_llava(1)
        # As loading does. Code may read it, so it is part of keys.
        for config in (model.config, model.config.text_config, model.config.vision_config):
            config.dtype = torch.float32
        model.save_pretrained(FOLDER)
        return model
    return type(tiny_llava(1)).from_pretrained(FOLDER).eval()


def adapted() -> Any:
    """A Qwen2.5-VL with LoRA on its decoder and its encoder."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_qwen2_5_vl(1), config).eval()


def quantised() -> Any:
    """A Qwen2.5-VL with a decoder of int8."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_qwen2_5_vl(1)
    quantize_(model.model.language_model, Int8WeightOnlyConfig())
    return model


MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "tiny": ("tiny", tiny_vlm),
    "llava from a folder": ("llava", from_folder),
    "qwen with LoRA": ("qwen", adapted),
    "quantised qwen": ("qwen", quantised),
}


def keys(prompts: Callable[[int], Any], model: Any) -> list[str]:
    """Return the keys of all entries after two calls with new images."""
    store = MemoryStore(1 << 28)
    if hasattr(model, "config"):
        model = vlcache_fx.compile(model, store=store, lowering="eager", dynamic=DYNAMIC or None)
    else:
        options = {"store": store, "lowering": "eager"}
        model = torch.compile(model, backend="vlcache", options=options, dynamic=DYNAMIC or None)
    with torch.no_grad():
        for seed in (0, 1):
            model(**prompts(seed))
    return sorted(entry.key for entry in store.entries())


if __name__ == "__main__":
    found = {name: keys(PROMPTS[prompts], build()) for name, (prompts, build) in MODELS.items()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")
