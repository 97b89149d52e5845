"""Builds the benchmarked models, and measures the sizes of their decoders."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlcache_fx.bench.presets import ModelSpec
from vlcache_fx.errors import OptionError

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Values of ``layer_types`` for layers with keys and values."""


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder that determine the lower bound of its time.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, vocabulary: as in the configuration.
        weights_of_layers: number of weights of each decoder layer.
        head_weights: number of weights of the output projection.
        item_bytes: bytes of one weight, and of one value of K or V.
        experts: whether the model is a mixture of experts.
        parameters: number of weights of the model as built.
        has_attention: per layer, whether it has keys and values; empty where all have.
        state_values: values of the state of a layer without; 0 where the configuration does not tell.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weights_of_layers: tuple[int, ...]
    head_weights: int
    item_bytes: int
    experts: bool
    parameters: int
    has_attention: tuple[bool, ...] = ()
    state_values: int = 0

    @property
    def layer_weights(self) -> int:
        """Number of weights of all decoder layers."""
        return sum(self.weights_of_layers)

    @property
    def attention_layers(self) -> int:
        """Number of layers with keys and values."""
        return sum(self.has_attention) if self.has_attention else self.layers

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.attention_layers * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all layers without keys and values, in float32."""
        return 4 * (self.layers - self.attention_layers) * self.state_values


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
    has_attention = tuple(kind in ATTENTION for kind in getattr(text, "layer_types", None) or ())
    return DecoderSize(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        weights_of_layers=tuple(map(_count, _decoder_layers(model, text.num_hidden_layers))),
        head_weights=0 if output is None else _count(output),
        item_bytes=model.dtype.itemsize,
        experts=any(getattr(text, name, None) for name in ("num_experts", "num_local_experts")),
        parameters=_count(model),
        has_attention=has_attention if not all(has_attention) else (),
        state_values=_state_values(text),
    )


def _state_values(text: Any) -> int:
    """Return the number of values of a layer's state, for layers that are configured as in Qwen3-Next."""
    names = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return math.prod(getattr(text, name, None) or 0 for name in names)


def _decoder_layers(model: nn.Module, layers: int) -> nn.ModuleList:
    """Return the list of decoder layers: the largest list of ``layers`` modules."""
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if not lists:
        raise OptionError(f"{type(model).__name__} has no list of {layers} layers")
    return max(lists, key=_count)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
