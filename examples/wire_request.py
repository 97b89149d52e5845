"""Run an exported folder without PyTorch: with numpy, ONNX Runtime and the manifest.

A sketch of ``OnnxSession`` for one picture per prompt and a policy of the first rows. A real server adds a
bounded store, complete keys (salt, positions, fingerprint; see ``wiring`` in the manifest), several pictures,
and checks.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Server:
    """Graphs of an exported folder, encoder outputs and donors.

    Args:
        directory: a folder that ``vlcache_fx.export`` wrote.
        budget: share of a picture's rows to recompute.
    """

    def __init__(self, directory: Path, budget: float = 0.02) -> None:
        self.manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
        self.budget = budget
        self.features: dict[str, list[Any]] = {}  # digest of pixels -> encoder outputs
        self.donors: dict[str, dict[str, Any]] = {}  # digest of pixels -> rows per slot
        self._graphs = {
            name: onnxruntime.InferenceSession(str(directory / graph["file"]))
            for name, graph in self.manifest["graphs"].items()
        }

    def run(self, graph: str, given: dict[str, Any]) -> dict[str, Any]:
        """Run a graph on its inputs among ``given``; return its outputs by name."""
        spec = self.manifest["graphs"][graph]
        inputs = {name: given[name] for name in spec["inputs"]}
        return dict(zip(spec["outputs"], self._graphs[graph].run(None, inputs), strict=True))

    def prefill(self, input_ids: Any, position_ids: Any, pixel_values: Any) -> tuple[str, dict[str, Any]]:
        """Run one prompt; return its mode (cold or warm) and results."""
        key = hashlib.blake2b(pixel_values.tobytes()).hexdigest()
        encoder = self.manifest["encoders"][0]
        if key not in self.features:  # otherwise skip the encoder
            outputs = self.run(encoder["graph"], {"pixel_values": pixel_values})
            self.features[key] = [outputs[name] for name in encoder["features"]]
        given = {"input_ids": input_ids, "position_ids": position_ids}
        given |= dict(zip(encoder["features"], self.features[key], strict=True))

        mask = self.run("spans", given)["mask.0"]
        span = np.flatnonzero(mask.reshape(input_ids.shape[1], -1)[:, 0])
        given |= self.plan(input_ids.shape[1], span, self.donors.get(key))
        mode = "warm" if key in self.donors else "cold"
        results = self.run(f"prefill_{mode}", given)
        if mode == "cold":  # exact rows, without positions: valid in any later prompt
            self.donors[key] = {
                slot: np.take(results[f"recorded.{slot}"], span, row["dim"])
                for slot, row in self.manifest["decoder"]["rows"].items()
            }
        return mode, results

    def plan(self, num_tokens: int, span: Any, donor: dict[str, Any] | None) -> dict[str, Any]:
        """Return the plan's inputs: the rows to compute, and the sources of all tokens."""
        recomputed = max(1, int(self.budget * len(span))) if donor else len(span)
        is_reused = np.isin(np.arange(num_tokens), span[recomputed:])
        rows = np.flatnonzero(~is_reused)
        source = np.zeros(num_tokens, dtype=np.int64)
        source[span] = np.arange(len(span))  # v >= 0: row v of the donor
        source[rows] = -1 - np.arange(len(rows))  # -1 - j: computed row j
        tail = rows[-2:]  # only the last token needs logits, but graphs compute at least two rows
        groups = range(len(self.manifest["decoder"]["layer_groups"]))
        inputs = {"rows.tail": tail, "results": np.array([1])}
        for group in groups:
            inputs |= {f"rows.{group}": rows, f"source.{group}": source}
            after = group + 1 if group + 1 in groups else "tail"
            inputs[f"keep.{group}.{after}"] = np.searchsorted(rows, tail if after == "tail" else rows)
        return inputs | {f"donor.{slot}": value for slot, value in (donor or {}).items()}


def main(directory: Path) -> list[str]:
    """Run two prompts about one picture, and compare them with the model; return a line for each.

    Exports the model first, unless ``directory`` contains an export.
    """
    from dataclasses import replace

    import torch  # for export and comparison
    from export_onnx import PROMPTS, prompt_inputs

    import vlcache_fx
    from vlcache_fx.testing import reference_vlm

    model, processor = reference_vlm.load_model(), reference_vlm.load_processor()
    question = reference_vlm.make_questions(count=1)[0]
    asked = [prompt_inputs(model, processor, replace(question, system_prompt=prompt)) for prompt in PROMPTS]
    if not (directory / "manifest.json").exists():
        vlcache_fx.export(model, asked[0], directory)
    server, lines = Server(directory), []
    for inputs in asked:
        named = {name: inputs[name].numpy() for name in ("input_ids", "position_ids", "pixel_values")}
        mode, results = server.prefill(**named)
        with torch.no_grad():
            exact = model(**inputs, logits_to_keep=1).logits[0, -1].numpy()
        words = [processor.decode([int(np.argmax(logits))]) for logits in (results["logits"][0, -1], exact)]
        lines.append(f"{mode}: {words[0]}, the model alone: {words[1]}")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "export"
        print("\n".join(main(target)))
