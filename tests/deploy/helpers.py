"""Exported models with their originals, prompts, and expected results of sessions."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from vlcache_fx.deploy.manifest import FORMAT, Manifest
from vlcache_fx.deploy.session import Session
from vlcache_fx.deploy.sessions import OnnxSession
from vlcache_fx.deploy.specs import EncoderGraph, GraphSpec, ProgramGraph, PrologueGraphs, TensorSpec
from vlcache_fx.integrations.transformers import EncodersFirst
from vlcache_fx.plan.selection import RowSelection
from vlcache_fx.spec.decoder import DecoderSpec, Digests, MaskSpec, SpanSpec
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.testing.families import llava_inputs, qwen_inputs

ATOL, RTOL = 2e-5, 1e-4
"""Tolerance of float32 results: ONNX Runtime sums in another order than torch."""

GRIDS = ((8, 8), (4, 8))
"""Grids of the two images of a Qwen prompt."""

TINY_LENGTHS = (20, 24)
"""Tokens of the two images of a ``TinyVlm`` prompt."""


@dataclass(frozen=True)
class Exported:
    """A model and its export.

    Attributes:
        kind: ``llava``, ``half``, ``qwen`` or ``tiny``: which prompts it takes.
        model: unmodified.
        folder: read only; a test that changes files takes ``copied``.
        report: what ``export`` returned, as plain data.
    """

    kind: str
    model: Any
    folder: Path
    report: dict[str, Any]

    @property
    def atol(self) -> float:
        """Absolute tolerance of results."""
        return 2e-3 if self.kind == "half" else ATOL

    @property
    def manifest(self) -> Manifest:
        """The manifest on disk."""
        return Manifest.load(self.folder)

    def session(self, **options: Any) -> OnnxSession:
        """Create a session on ONNX Runtime; by default strict, with spans of any length."""
        return OnnxSession(self.folder, **{"strict": True, "min_span_tokens": 4, **options})

    def copied(self, target: Path) -> Path:
        """Copy the folder."""
        return Path(shutil.copytree(self.folder, target))

    def inputs(self, images: Sequence[int], text: int = 0) -> dict[str, Tensor]:
        """Inputs of the model for a prompt with the given images.

        Args:
            images: which of them.
            text: another number gives another text, of another length.
        """
        return PROMPTS[self.kind](images, text)

    def given(self, images: Sequence[int], text: int = 0) -> dict[str, Tensor]:
        """Inputs of a session for the same prompt, with the model's positions unless they are trivial."""
        inputs = self.inputs(images, text)
        with torch.no_grad():
            positions = EncodersFirst(self.model)((), dict(inputs))[1].get("position_ids")
        return inputs if positions is None else {**inputs, "position_ids": positions}

    def expected(self, images: Sequence[int], text: int = 0) -> dict[str, Tensor]:
        """Results of the unmodified model, by the names of the graphs' outputs."""
        with torch.no_grad():
            return named_results(self.kind, self.model, self.inputs(images, text))


def named_results(kind: str, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results of an unmodified or compiled model, by their names in sessions."""
    if kind == "tiny":
        return {"result.0": model(**inputs)}
    result = model(**inputs, use_cache=True, logits_to_keep=1)
    caches = {
        f"present.{index}.{name}": tensor
        for index, layer in enumerate(result.past_key_values.layers)
        for name, tensor in (("key", layer.keys), ("value", layer.values))
    }
    return {"logits": result.logits, **caches}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = ATOL) -> None:
    """Compare results by name."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, atol=atol, rtol=RTOL, msg=lambda text, name=name: f"{name}: {text}"
        )


def report_of(session: Session) -> dict[str, Any]:
    """Report of the last prefill."""
    report = session.vlcache.last_report
    assert report is not None
    return report


def _llava(images: Sequence[int], text: int) -> dict[str, Tensor]:
    return llava_inputs(5 + 4 * text, 4 + text, images, text_seed=text)


def _half(images: Sequence[int], text: int) -> dict[str, Tensor]:
    inputs = _llava(images, text)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].half()
    return inputs


def _qwen(images: Sequence[int], text: int) -> dict[str, Tensor]:
    return qwen_inputs(5 + 4 * text, 4 + text, [(*GRIDS[image], image) for image in images], text_seed=text)


def _tiny(images: Sequence[int], text: int) -> dict[str, Tensor]:
    from vlcache_fx.testing.tiny_vlm import tiny_vlm_inputs

    return tiny_vlm_inputs(5 + 4 * text, 4 + text, [(TINY_LENGTHS[i], i) for i in images], text_seed=text)


PROMPTS = {"llava": _llava, "half": _half, "qwen": _qwen, "tiny": _tiny}


def tiny_shapes() -> dict[str, Any]:
    """``dynamic_shapes`` of a ``TinyVlm``: prompts and images of any length."""
    tokens, patches = Dim("tokens", min=4, max=512), Dim("patches", min=2, max=256)
    return {"input_ids": {1: tokens}, "pixel_values": {0: patches}}


def bare_manifest(**changes: Any) -> Manifest:
    """Create a small valid manifest with changes."""
    program = ProgramGraph("prefill_cold", ("input_ids",), ("logits",), ProgramSpec((), ()))
    graph = GraphSpec(
        "prefill_cold.onnx",
        {"input_ids": TensorSpec("int64", (1, "tokens"))},
        {"logits": TensorSpec("float", (1, 1, 7))},
    )
    decoder = DecoderSpec(
        num_layers=1, layer_groups=(1,), num_outputs=1, num_results=1, writes=(), data=(0,), host_inputs=(),
        tail=RowSelection((-1,)), tail_varies=False, has_past=False, rows={}, layout="",
        computation=Digests("", ""), weights=(), other_weights=(), model_fingerprint="",
        spans=SpanSpec((), 0), leaves=(), masks=MaskSpec((), (), every_layer_has_one=False),
    )  # fmt: skip
    plain = Manifest(
        format=FORMAT, library_version="0", model="None", dtype="float32", opset=22, policy="layer_aware",
        budget=0.02, profile_fingerprint=None, graphs={"prefill_cold": graph}, cold=program, warm=program,
        encoders=(), inputs=("input_ids",), prologue=PrologueGraphs((), (), ()), decoder=decoder,
        decode=None, engines={}, wiring=(),
        report={"lookups": [], "restricted": [], "hoisted": [], "refused": []}, files={},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def encoder(graph: str, modality: str, **fixed: tuple[int, ...]) -> EncoderGraph:
    """An encoder with one output."""
    return EncoderGraph(graph, modality, fixed, (f"{modality or 'all'}.features",))
