"""The photo VLM: LLaVA with SmolLM2-135M-Instruct and EfficientNet-Lite2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_fx.testing.assets import find_assets
from vlcache_fx.testing.photo_vlm.parts import OF_DECODER, decoder_file, encoder_file, require_parts

if TYPE_CHECKING:
    import torch

    from vlcache_fx.testing.photo_vlm.llava import PhotoVlm
    from vlcache_fx.testing.photo_vlm.processor import PhotoProcessor

PROJECTOR_FILE, UPDATES_FILE = "projector.safetensors", "updates.safetensors"


def load_decoder(dtype: torch.dtype, attn_implementation: str = "sdpa") -> Any:
    """Load SmolLM2-135M-Instruct from its package, with 4-bit weights unpacked to ``dtype``."""
    from transformers import AutoModelForCausalLM, GgufConfig

    require_parts(OF_DECODER)
    path = decoder_file()
    decoder = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    if hasattr(decoder.config, "quantization_config"):
        del decoder.config.quantization_config  # The weights are plain now.
    return decoder


def load_encoder() -> Any:
    """Load EfficientNet-Lite2 from its package, in float32."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    encoder = EfficientNet.from_name("efficientnet-lite2")
    encoder.load_state_dict(torch.load(encoder_file(), map_location="cpu", weights_only=True))
    return encoder.requires_grad_(False).train(False)


def load_model(
    dtype: torch.dtype | None = None, attn_implementation: str = "sdpa", folder: str | Path | None = None
) -> PhotoVlm:
    """Assemble the model, in eval mode, on the CPU (``dtype``: float32 unless given).

    Args:
        dtype: dtype of weights and computation.
        attn_implementation: as in transformers.
        folder: folder of the trained projector and updates; by default in ``vlcache_fx_models``.

    Raises:
        ImportError: a pretrained or trained part is not installed.
    """
    import torch
    from safetensors.torch import load_file

    from vlcache_fx.testing.photo_vlm.adapter import Projector, merge_updates
    from vlcache_fx.testing.photo_vlm.llava import PhotoVlm

    require_parts()
    folder = Path(folder or find_assets("photo_vlm"))
    decoder = load_decoder(torch.float32, attn_implementation)
    merge_updates(decoder.model, load_file(folder / UPDATES_FILE))
    projector = Projector()
    trained = load_file(folder / PROJECTOR_FILE)
    projector.load_state_dict({name: value.float() for name, value in trained.items()})
    model = PhotoVlm.assemble(decoder, load_encoder(), projector)
    model.to(dtype=dtype or torch.float32)  # type: ignore[call-arg]
    model.requires_grad_(False)
    model.train(False)
    return model


def load_processor() -> PhotoProcessor:
    """Load the processor: SmolLM2's tokenizer, and pictures as pixels.

    Raises:
        ImportError: a pretrained part is not installed.
    """
    from vlcache_fx.testing.photo_vlm.processor import PhotoProcessor

    return PhotoProcessor(load_tokenizer())


def load_tokenizer() -> Any:
    """Load SmolLM2's tokenizer from its package; it pads on the left."""
    from transformers import AutoTokenizer

    require_parts(OF_DECODER)
    path = decoder_file()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer
