"""Runs an exported folder with reuse: store, policies, plans and reports of the ``torch.compile`` backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vlcache_fx.deploy.folder_checks import check_references
from vlcache_fx.deploy.inputs import decoder_inputs, num_tokens, with_a_row
from vlcache_fx.deploy.items import encoder_inputs
from vlcache_fx.deploy.manifest import Manifest
from vlcache_fx.deploy.specs import INPUT_VALUES, MASKS, SPANS, WEIGHTS, ProgramGraph
from vlcache_fx.errors import ExportError, OptionError, Reason, UnsupportedGraphError
from vlcache_fx.options import Options
from vlcache_fx.plan import build_plan
from vlcache_fx.policies.none import NoRows
from vlcache_fx.runtime.call_context import CallContext
from vlcache_fx.runtime.encode import EncoderRunner
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.prefill import DecoderRunner
from vlcache_fx.runtime.programs.lowered import Lowered, resolved
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.runtime.requests.media_spans import MediaItems
from vlcache_fx.runtime.requests.prologue import Prologue
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.spec.program import EncoderSpec

COMPILE_OPTIONS = ("lowering", "dynamic", "cuda_graphs", "mode", "passes", "dump_graphs", "dry_run")
"""Options of the backend that do not apply to exported graphs."""


class GraphRunner(Protocol):
    """Runs the graphs of one exported folder."""

    device: torch.device
    """Device of inputs and outputs."""

    def check(self, graph: str, inputs: Mapping[str, Tensor]) -> None:
        """Raise ExportError for unsupported sizes."""

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a graph; return its outputs by name."""


class Session:
    """An exported model with reuse.

    Args:
        manifest: the folder's manifest.
        runner: runs its graphs.
        options: see ``Options``; policy and budget default to those of the export.

    Attributes:
        vlcache: the engine: reports, statistics, store, settings.
        manifest: the folder's manifest.
    """

    def __init__(self, manifest: Manifest, runner: GraphRunner, options: Mapping[str, Any]) -> None:
        check_references(manifest)
        self.manifest, self._runner = manifest, runner
        self.vlcache = engine = ServingEngine(_options(manifest, options))
        outputs = manifest.prologue
        prologue = Prologue(
            spans=self._outputs(SPANS, outputs.spans),
            masks=self._outputs(MASKS, outputs.masks),
            input_values=self._outputs(INPUT_VALUES, outputs.input_values),
        )
        self._identifier = Identifier(manifest.decoder.spans, prologue.spans)
        self._cold = self._program("cold", manifest.cold, engine)
        self._decoder = DecoderRunner(
            manifest.decoder,
            prologue,
            self._cold,
            self._program("warm", manifest.warm, engine),
            runner.device,
            engine,
            self._without_reuse,
            self._logits_to_shadow(),
        )
        self._encoders = {spec.graph: self._encoder(spec.graph, spec.features) for spec in manifest.encoders}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.manifest.model} ({self.manifest.dtype}), {self.vlcache!r}>"

    def prefill(self, **inputs: Any) -> dict[str, Tensor]:
        """Run one prompt.

        Args:
            **inputs: token ids, other inputs of the graphs, and for each item its pixels (and grid) or its
                features.

        Returns:
            Results by name: ``logits`` of the last token and ``present.<layer>.key`` and ``.value`` of all
            tokens, [1, heads, tokens, dim], for models of the transformers library.

        Raises:
            ExportError: an input is missing, unknown, or has another dtype or shape.
        """
        features, context = self._features(inputs)
        args = decoder_inputs(self.manifest, inputs, features, self._runner.device)
        named = dict(zip(self.manifest.inputs, map(with_a_row, args), strict=True))
        for program in (self.manifest.cold, self.manifest.warm):
            # Before the lookup: a program that fails later is disabled.
            self._runner.check(program.graph, named)
        with torch.no_grad():
            results = self._decoder(args, context)
        names = self.manifest.cold.results
        return {
            name: result
            for name, result in zip(names, results, strict=False)
            if name is not None and result is not None
        }

    def decode(
        self, input_ids: Tensor, position_ids: Tensor, cache: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Run one decoding step.

        Args:
            input_ids: int64 [1, 1].
            position_ids: its position, with the prefill's layout.
            cache: results of ``prefill`` or of the previous step; only ``present.*`` is used.

        Returns:
            ``logits`` and the extended cache.

        Raises:
            ExportError: the export has no decoding step, or ``cache`` is incomplete.
        """
        graph = self._decoding_graph()
        past = {
            name.replace("present", "past", 1): value for name, value in cache.items() if "present." in name
        }
        given = {"input_ids": input_ids, "position_ids": position_ids, **past}
        names = self.manifest.graphs[graph].inputs
        for name in names:
            if name not in given:
                raise ExportError(f"the cache lacks {name!r}")
        return self._runner.run(graph, {name: given[name] for name in names})

    def generate(self, max_new_tokens: int, eos_token_id: int | None = None, **inputs: Any) -> Tensor:
        """Return the greedy answer to one prompt: int64 [new tokens].

        Args:
            max_new_tokens: limit of its length.
            eos_token_id: ends the answer.
            **inputs: see ``prefill``.
        """
        graph = self._decoding_graph()
        state = self.prefill(**inputs)
        position = inputs.get("position_ids")
        if position is None:
            shape = self.manifest.graphs[graph].inputs["position_ids"].shape
            position = torch.full([int(size) for size in shape], inputs["input_ids"].shape[1] - 1)
        answer: list[int] = []
        for step in range(1, max_new_tokens + 1):
            answer.append(int(state["logits"][0, -1].argmax()))
            if answer[-1] == eos_token_id or step == max_new_tokens:
                break
            token = torch.tensor([[answer[-1]]], device=self._runner.device)
            state = self.decode(token, position[..., -1:] + step, state)
        return torch.tensor(answer)

    def _logits_to_shadow(self) -> int | None:
        if not self.vlcache.options.shadow:
            return None
        if "logits" in self.manifest.cold.results:
            return self.manifest.cold.results.index("logits")
        self.vlcache.refuse_shadow(
            UnsupportedGraphError(Reason.NO_LOGITS, "these graphs have no result named logits")
        )
        return None

    def _decoding_graph(self) -> str:
        if self.manifest.decode is None:
            raise ExportError(
                "this export has no decoding step: manifest.report['refused'] states the reason"
            )
        return self.manifest.decode

    def _features(self, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], CallContext]:
        """Encode all items; return their features by name, and the context of the decoder's call."""
        found: dict[str, list[Tensor]] = {}
        hits: list[bool] = []
        for item in encoder_inputs(self.manifest, inputs):
            results, hit = self._encoders[item.spec.graph](list(item.values))
            hits.append(hit)
            for name, value in zip(item.spec.features, results, strict=True):
                found.setdefault(name, []).append(value)
        context = CallContext(all(hits) if hits else None)
        for modality in {spec.modality for spec in self.manifest.encoders if spec.modality}:
            rows = next((parts for name, parts in found.items() if name.startswith(f"{modality}.")), [])
            context = context.with_items(modality, MediaItems(tuple(part.shape[-2] for part in rows)))
        features = {name: torch.cat(parts, -2) for name, parts in found.items()}
        return features, context

    def _outputs(self, graph: str, outputs: Sequence[str]) -> Any:
        """Return a function: the decoder's inputs -> outputs of a graph of the prologue."""

        def run(*args: Any) -> list[Tensor]:
            if not outputs:
                return []
            named = dict(zip(self.manifest.inputs, args, strict=True))
            inputs = {name: named[name] for name in self.manifest.graphs[graph].inputs}
            results = self._runner.run(graph, inputs)
            return [results[name] for name in outputs]

        return run

    def _program(self, name: str, graph: ProgramGraph, engine: ServingEngine) -> ProgramRunner:
        def run(args: Sequence[Any]) -> tuple[Any, ...]:
            given = zip(graph.inputs, args, strict=True)
            inputs = {key: with_a_row(resolved(value)) for key, value in given if key}
            results = self._runner.run(graph.graph, inputs)
            return tuple(None if key is None else results[key] for key in graph.results)

        lowered: Lowered = run
        return ProgramRunner(name, graph.program, lambda: lowered, self._runner.device, engine)

    def _encoder(self, graph: str, features: Sequence[str]) -> EncoderRunner:
        names = list(self.manifest.graphs[graph].inputs)

        def run(*args: Any) -> list[Tensor]:
            results = self._runner.run(graph, dict(zip(names, args, strict=True)))
            return [results[name] for name in features]

        files = self.manifest.files
        digests = [spec.blake3 for name, spec in files.items() if name.startswith(f"{graph}.")]
        digests += [files[WEIGHTS].blake3]
        computations = tuple(f"{digests}:{name}" for name in features)
        return EncoderRunner(run, EncoderSpec(tuple(range(len(names))), (), computations), self.vlcache)

    def _without_reuse(self, *args: Any) -> Sequence[Any]:
        spec = self.manifest.decoder
        if self._identifier.media_spans(args) is None:
            raise ExportError("placeholders and encoder features do not agree in number or width")
        tokens = num_tokens(self.manifest, list(args))
        positions = spec.positions(tokens, args)
        plan = build_plan(
            num_tokens=tokens, spans=(), num_layers=spec.num_layers, policy=NoRows(), budget=0.0,
            output_rows=positions,
        )  # fmt: skip
        self._cold.ready()
        results = self._cold.run(args, self._cold.bind(plan, positions, dict))
        if results is None:
            reasons = "; ".join(str(refusal) for refusal in self.vlcache.refusals)
            raise ExportError(f"the cold graph failed: {reasons}")
        return results[: spec.num_outputs]


def _options(manifest: Manifest, given: Mapping[str, Any]) -> Options:
    for name in COMPILE_OPTIONS:
        if name in given:
            raise OptionError(f"option {name!r} does not apply to exported graphs")
    defaults = {"policy": manifest.policy, "budget": manifest.budget, "lowering": "eager"}
    return Options.parse({**defaults, **given})
