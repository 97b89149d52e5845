"""Builds the benchmarked models, and measures the sizes of their decoders."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.errors import OptionError


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder that determine the lower bound of its time.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocabulary: as in the configuration.
        layer_weights: number of weights of all decoder layers.
        head_weights: number of weights of the output projection.
        item_bytes: bytes of one weight, and of one value of K or V.
        experts: whether the model is a mixture of experts.
        parameters: number of weights of the model as built.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layer_weights: int
    head_weights: int
    item_bytes: int
    experts: bool
    parameters: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.item_bytes


def build_model(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Any:
    """Build a model with random weights (fixed seed), in eval mode on ``device``.

    Raises:
        OptionError: transformers has no such class, or the class rejects the configuration.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError  # raised by configurations

    model_class: Any = getattr(transformers, spec.model_class, None)
    if model_class is None or not hasattr(model_class, "config_class"):
        raise OptionError(
            f"model_class={spec.model_class!r} is not valid: transformers {transformers.__version__} has no"
            " such model (example: 'Qwen2_5_VLForConditionalGeneration')"
        )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        try:
            config = model_class.config_class.from_dict(copy.deepcopy(dict(spec.config)))
            # `.to(dtype)` would round the rotary frequencies, too.
            model = model_class._from_config(config, dtype=dtype)
        except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise OptionError(f"{spec.model_class} rejects the configuration: {error}") from error
    model.requires_grad_(requires_grad=False)
    return model.eval()


def share_weights(model: nn.Module) -> Any:
    """Copy a module; the copy shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def decoder_size(model: Any) -> DecoderSize:
    """Measure a model of the transformers library."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    output = model.get_output_embeddings()
    return DecoderSize(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        layer_weights=_count(_decoder_layers(model, text.num_hidden_layers)),
        head_weights=0 if output is None else _count(output),
        item_bytes=model.dtype.itemsize,
        experts=any(getattr(text, name, None) for name in ("num_experts", "num_local_experts")),
        parameters=_count(model),
    )


def _decoder_layers(model: nn.Module, layers: int) -> nn.Module:
    """Return the list of decoder layers: the largest list of ``layers`` modules."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if not lists:
        raise OptionError(f"{type(model).__name__} has no list of {layers} layers")
    return max(lists, key=_count)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
