"""Export the reference model, and ask about a picture twice on ONNX Runtime: the second call reuses it."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import vlcache_fx
from vlcache_fx.integrations.stages import prompt_positions
from vlcache_fx.testing import reference_vlm

PROMPTS = ("you are a helpful assistant .", "look at the picture with care .")


def prompt_inputs(model: Any, processor: Any, question: Any) -> dict[str, Any]:
    """Return the graphs' inputs: token ids, pixels, grids and positions."""
    inputs = dict(reference_vlm.prepare(processor, [question]))
    return {**inputs, "position_ids": prompt_positions(model, inputs)}


def main(directory: Path) -> list[str]:
    """Export into ``directory`` and ask; return mode, recomputed share and answer of each call."""
    model, processor = reference_vlm.load_model(), reference_vlm.load_processor()
    question = reference_vlm.make_questions(count=1)[0]
    asked = [prompt_inputs(model, processor, replace(question, system_prompt=prompt)) for prompt in PROMPTS]
    report = vlcache_fx.export(model, asked[0], directory)
    lines = [f"exported {report.size_bytes / 1e6:.1f} MB, {len(report.lookups)} lookups"]

    session = vlcache_fx.OnnxSession(directory)  # needs no model
    for inputs in asked:
        answer = session.generate(3, processor.tokenizer.eos_token_id, **inputs)
        last = session.vlcache.last_report
        assert last is not None
        share = 100 * last["token_layer_fraction"]
        text = processor.decode(answer, skip_special_tokens=True)
        lines.append(f"{last['mode']}, {share:.1f} % computed: {text}")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "export"
        print("\n".join(main(target)))
