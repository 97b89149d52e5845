"""Libraries in this process: vlcache_fx, and transformers without it."""

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vlcache_fx
from examples.vs_vllm.answer import Answer, FloatArray
from examples.vs_vllm.cases import Request
from examples.vs_vllm.checkpoint import IMAGE, MERGE, PATCH, TEMPORAL_PATCH, read_model
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.integrations.processor import CachedImageProcessor
from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor


class LocalPeer:
    """``generate()`` of an unmodified transformers model."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: Any = read_model(checkpoint)
        self._processor: Any = ReferenceImageProcessor(PATCH, MERGE, TEMPORAL_PATCH)
        self._encoder_runs = 0
        self.model.model.visual.register_forward_hook(self._count)
        self._logits: Tensor | None = None

    def _count(self, *_: Any) -> None:
        self._encoder_runs += 1

    @property
    def keeps(self) -> bool:
        """See ``Peer``."""
        return False

    def ask(self, request: Request) -> Answer:
        """See ``Peer``."""
        picture = Image.fromarray(np.load(request.photo))
        ids = torch.tensor([request.ids(request.vision_tokens)])
        runs = self._encoder_runs
        start = time.perf_counter()
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            **self._processor(picture),
        }
        ready = time.perf_counter()
        output = self.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        end = time.perf_counter()
        self._logits = output.logits[0][0]
        num_tokens = ids.shape[1]
        computed, reuse = self._describe(num_tokens)
        runs = self._encoder_runs - runs
        return Answer(end - start, end - ready, num_tokens, computed, runs, reuse)

    def _describe(self, num_tokens: int) -> tuple[int, str]:
        """Return the rows that the first layer computed, and whether the result is exact."""
        return num_tokens, "exact"

    def logprobs(self, request: Request) -> FloatArray:
        """See ``Peer``."""
        self.ask(request)
        assert self._logits is not None
        logprobs: FloatArray = torch.log_softmax(self._logits.float(), -1).numpy()
        return logprobs

    def close(self) -> None:
        """See ``Peer``."""
        self.model = None


class CompiledPeer(LocalPeer):
    """``generate()`` with plain ``torch.compile``, with the Dynamo settings of ``vlcache_fx.compile``."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        plain = self.model.forward
        compiled: Any = torch.compile(plain, dynamic=True)

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with dynamo_settings(DYNAMO_CONFIG):
                return compiled(*args, **kwargs)

        self.model.forward = forward


class VlcachePeer(LocalPeer):
    """vlcache_fx; ``options``: see ``vlcache_fx.compile``."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        super().__init__(checkpoint)
        self._processor = CachedImageProcessor(self._processor)  # vLLM caches processed photos, too
        self.model = vlcache_fx.compile(self.model, dynamic=True, **options)

    @property
    def keeps(self) -> bool:
        """See ``Peer``."""
        return True

    def _describe(self, num_tokens: int) -> tuple[int, str]:
        report = self.model.vlcache.last_report
        if report["mode"] != "warm":
            return num_tokens, "exact" if report["mode"] == "cold" else f"exact, bypass: {report['reason']}"
        share = report["token_layer_fraction"]
        if all(span["start"] < report["prefix_tokens"] for span in report["spans"]):
            return report["rows_per_layer"][0], "exact"
        return report["rows_per_layer"][0], f"approximate, {100 * share:.1f} % of the photo recomputed"

    def close(self) -> None:
        """See ``Peer``."""
        self.model.vlcache.close()
        super().close()
