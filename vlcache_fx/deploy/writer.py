"""Writes programs, prologue, encoders and other stages as ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx

from vlcache_fx.compiler.builders.decoder import Decoder
from vlcache_fx.compiler.builders.programs import program_spec
from vlcache_fx.deploy.flatten import FlatGraph, flatten, group_of, slot_name
from vlcache_fx.deploy.onnx import SharedWeights, to_onnx
from vlcache_fx.deploy.operators import plain_operators
from vlcache_fx.deploy.sample_calls import ExampleCall, features_of
from vlcache_fx.deploy.specs import (
    INPUT_VALUES,
    MASKS,
    SPANS,
    EncoderGraph,
    GraphSpec,
    ProgramGraph,
    PrologueGraphs,
)
from vlcache_fx.deploy.trace import ExportInput, is_dynamic, unrolled
from vlcache_fx.errors import ExportError
from vlcache_fx.integrations.stages import Stage
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.passes import Program
from vlcache_fx.spec.slots import Donor, InputSlot, Keep, Positions, Rows, Source


class GraphWriter:
    """Writes the graphs of one export.

    Args:
        found: the traced model.
        groups: number of layers in each group of consecutive layers that compute the same rows.
        opset: ONNX opset of the graphs.
        folder: the export's folder.
        weights: the file of shared weights.
        graphs: receives the spec of each graph.
    """

    def __init__(
        self,
        found: ExportInput,
        groups: Sequence[int],
        opset: int,
        folder: Path,
        weights: SharedWeights,
        graphs: dict[str, GraphSpec],
    ) -> None:
        self._found, self._groups, self._opset = found, groups, opset
        self._folder, self._weights, self._graphs = folder, weights, graphs

    def program(self, name: str, program: Program, call: ExampleCall) -> ProgramGraph:
        """Write one of the two prefill programs."""
        found = self._found
        slots = [slot_name(slot, self._groups) for slot in program.slots]
        results = [*found.results, *(f"recorded.{slot}" for slot in program.recorded)]
        flat = self._flat(program.graph_module, [*found.inputs, *slots], results)
        placeholders = program.graph_module.graph.find_nodes(op="placeholder")
        slot_of = dict(zip(placeholders[len(found.inputs) :], program.slots, strict=True))
        dynamic = {
            key: found.dynamic.get(key)
            or self._dynamic_dims(slot_of.get(placeholders[index]), placeholders[index])
            for key, index in flat.inputs.items()
        }
        examples = {key: call.inputs[index] for key, index in flat.inputs.items()}
        self._save(name, flat, examples, dynamic)
        data = [key for key in found.inputs if key is not None]
        kept = [key if key in flat.inputs else None for key in (*data, *slots)]
        return ProgramGraph(name, tuple(kept), flat.results, program_spec(program))

    def _dynamic_dims(self, slot: InputSlot | None, node: fx.Node) -> dict[int, str]:
        """Name the dynamic dimensions of an input that passes added."""
        match slot:
            case Donor():
                size = "donor_rows"
            case Source():
                size = "tokens"
            case Rows() | Keep() | Positions():
                size = f"rows_{group_of(slot.row_level, self._groups)}"
            case _:
                return {}
        shape = node.meta["val"].shape
        return {dim: size for dim, length in enumerate(shape) if is_dynamic(length)}

    def prologue(self, decoder: Decoder) -> PrologueGraphs:
        """Write the graphs that run before the decoder."""
        nodes = decoder.prologue_nodes()
        return PrologueGraphs(
            spans=self._output_graph(SPANS, nodes.spans),
            masks=self._output_graph(MASKS, nodes.masks),
            input_values=self._output_graph(INPUT_VALUES, nodes.input_values),
        )

    def _output_graph(self, name: str, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        """Write a graph that computes ``nodes``; return the name of each output."""
        found = self._found
        if not nodes:
            return ()
        results = [f"mask.{number}" for number in range(len(nodes))]
        flat = self._flat(extract(found.decoder.graph_module, nodes), list(found.inputs), results)
        examples = {key: found.values[key] for key in flat.inputs}
        self._save(name, flat, examples, {key: found.dynamic[key] for key in flat.inputs})
        return tuple(str(result) for result in flat.results)

    def encoders(self, refused: list[dict[str, str]]) -> list[EncoderGraph]:
        """Write the encoders that torch can export."""
        found = self._found
        if found.split is not None and found.stages is None:
            count = len(found.inputs) - len(features_of(found.split))
            names = [str(name) for name in found.inputs[count:]]
            flat = self._flat(found.split.encoder, list(found.inputs[:count]), names)
            examples = {key: found.values[key] for key in flat.inputs}
            self._save("encoder", flat, examples, {key: found.dynamic[key] for key in flat.inputs})
            return [EncoderGraph("encoder", "", {}, tuple(names))]
        made = []
        for number, item in enumerate(found.stages.encoders if found.stages else ()):
            name = "encoder" if number == 0 else f"encoder.{number}"
            if self.stage(name, item.stage, refused):
                made.append(EncoderGraph(name, item.modality, item.fixed, item.stage.outputs))
        return made

    def stage(self, name: str, stage: Stage, refused: list[dict[str, str]]) -> bool:
        """Write an unmodified stage; on failure return False and append the reason to ``refused``."""
        try:
            is_fixed = not any(stage.dynamic.values())
            module = unrolled(stage) if is_fixed else stage.module
            shapes = None if is_fixed else stage.shapes(str)
            model = to_onnx(module.eval(), stage.inputs, shapes, stage.outputs, self._opset)
            self._graphs[name] = self._weights.save(model, self._folder / f"{name}.onnx", {})
        except ExportError as error:
            refused.append({"graph": name, "reason": str(error)})
            return False
        return True

    def _flat(self, graph: fx.GraphModule, inputs: list[str | None], results: Sequence[str]) -> FlatGraph:
        found = self._found
        weights = {index: pair for index, pair in found.weights.items() if index < len(inputs)}
        return flatten(graph, inputs, weights, results, plain_operators(self._opset))

    def _save(
        self, name: str, flat: FlatGraph, examples: dict[str, Tensor], dynamic: dict[str, dict[int, str]]
    ) -> None:
        names = {f"weight_{index}": weight for index, (weight, _) in self._found.weights.items()}
        shapes = tuple(dynamic[key] for key in examples)
        model = to_onnx(flat.module.eval(), examples, shapes, flat.outputs, self._opset)
        self._graphs[name] = self._weights.save(model, self._folder / f"{name}.onnx", names)
