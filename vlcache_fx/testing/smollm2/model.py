"""Loads SmolLM2-135M-Instruct, and its processor of passages."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vlcache_fx.testing.smollm2.processor import PassageProcessor


@functools.cache
def load_tokenizer() -> Any:
    """Load the tokenizer, once.

    Raises:
        ImportError: a package is not installed.
    """
    from vlcache_fx.testing.photo_vlm import model

    return model.load_tokenizer()


def load_model() -> Any:
    """Load the model in float32 on the CPU, in eval mode.

    Raises:
        ImportError: a package is not installed.
    """
    import torch

    from vlcache_fx.testing.photo_vlm.model import load_decoder

    return load_decoder(torch.float32).requires_grad_(False).train(False)


def load_processor() -> PassageProcessor:
    """Load the processor. It has the model's table of embeddings.

    Raises:
        ImportError: a package is not installed.
    """
    from torch.nn import Embedding

    from vlcache_fx.testing.smollm2.processor import PassageProcessor

    load: Any = Embedding.from_pretrained  # untyped in torch
    return PassageProcessor(load_tokenizer(), load(_embeddings()))


def _embeddings() -> torch.Tensor:
    """The model's table of embeddings, ``[vocabulary, hidden]``, without the rest of the model."""
    import gguf
    import torch

    from vlcache_fx.testing.photo_vlm.parts import decoder_file

    tensors = gguf.GGUFReader(str(decoder_file())).tensors
    table = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    return torch.from_numpy(gguf.dequantize(table.data, table.tensor_type).copy())
