"""Runs vLLM, controlled over pipes. Started by path in vLLM's environment; imports nothing of this project.

Reads one JSON object per line from standard input, and writes one line per object to standard output. The
first object contains keyword arguments of ``vllm.LLM``; the others are requests::

    {"ids": [...], "photo": "photo.npy", "logprobs": null | "file.npy"}

Answers contain seconds, counts of tokens and encoder runs; or ``{"error": "..."}``.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np


class Worker:
    """An engine in this process, and the number of runs of its vision encoder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM  # type: ignore[import-not-found]  # in its own environment

        self.llm = LLM(**settings)
        self.encoder_runs = 0
        self.llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        def count(*_: Any) -> None:
            self.encoder_runs += 1

        model.visual.register_forward_hook(count)

    def ask(self, ids: list[int], photo: str, logprobs: str | None) -> dict[str, Any]:
        """Generate one token."""
        from PIL import Image
        from vllm import SamplingParams

        picture = Image.fromarray(np.load(photo))
        wanted = SamplingParams(
            temperature=0, max_tokens=1, detokenize=False, logprobs=-1 if logprobs else None
        )
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": picture}}
        runs = self.encoder_runs
        start = time.perf_counter()
        (output,) = self.llm.generate([prompt], wanted, use_tqdm=False)
        seconds = time.perf_counter() - start
        if logprobs:
            (found,) = output.outputs[0].logprobs
            np.save(logprobs, np.array([found[token].logprob for token in range(len(found))], np.float32))
        times = output.metrics
        return {
            "seconds": seconds,
            "model_seconds": times.first_token_ts - times.queued_ts,
            "num_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "encoder_runs": self.encoder_runs - runs,
        }


def main() -> None:
    """Answer requests until standard input ends."""
    # vLLM and its libraries print: redirect their output, and keep standard output for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if worker is None:
                import torch
                import transformers
                import vllm

                worker = Worker(message)
                reply: dict[str, Any] = {
                    "vllm": vllm.__version__,
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "threads": torch.get_num_threads(),
                }
            else:
                reply = worker.ask(**message)
        except Exception as error:  # noqa: BLE001 - report any error to the parent
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
