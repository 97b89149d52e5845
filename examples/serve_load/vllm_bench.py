"""Sends a trace with vLLM's benchmark of servers, which measures any server of the OpenAI API."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.serve_load.load import Load, Result
from examples.serve_load.traces import Ask
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from examples.vs_vllm.remote import worker_variables

CODE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""``vllm bench serve``; its command line wants a package named vllm, and that for CPUs has another name."""


def send(
    asks: Sequence[Ask],
    url: str,
    model: str,
    tokenizer: Path,
    environment: Environment,
    *,
    at_once: int,
    answer_tokens: int,
    extra_body: Mapping[str, Any],
) -> Load:
    """Send a trace, ``at_once`` requests at a time.

    A system prompt becomes the text in front of the pictures: the program sends no other messages. It does
    not report how many tokens a server reused.

    Raises:
        PeerError: the program failed.
    """
    trace, found = environment.folder / "trace.jsonl", environment.folder / "trace-result.json"
    lines = [json.dumps({"content": content_of(ask), "output_tokens": answer_tokens}) for ask in asks]
    trace.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found.unlink(missing_ok=True)
    command = [
        str(environment.python), "-c", CODE, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
        "--base-url", url.removesuffix("/v1"), "--model", model, "--tokenizer", str(tokenizer),
        "--dataset-name", "custom_image", "--dataset-path", str(trace), "--disable-shuffle",
        "--custom-output-len", str(answer_tokens), "--num-prompts", str(len(asks)),
        "--max-concurrency", str(at_once), "--temperature", "0", "--ready-check-timeout-sec", "0",
        "--save-result", "--save-detailed", "--result-dir", str(found.parent),
        "--result-filename", found.name, "--extra-body", json.dumps(dict(extra_body)),
    ]  # fmt: skip
    variables = worker_variables(environment, [0], os.environ)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode or not found.exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise PeerError(f"vLLM's benchmark failed:\n{tail}")
    return read(json.loads(found.read_text(encoding="utf-8")))


def content_of(ask: Ask) -> list[dict[str, Any]]:
    """The chat as the content of one message."""
    system, user = ask.messages[0], ask.messages[-1]
    return [{"type": "text", "text": system["content"] + " "}, *user["content"]]


def read(found: Mapping[str, Any]) -> Load:
    """The answers in a result file, in the order of the trace."""
    results = []
    for text, first_s, gaps_s, tokens, prompt, error in zip(
        found["generated_texts"],
        found["ttfts"],
        found["itls"],
        found["output_lens"],
        found["input_lens"],
        found["errors"],
        strict=True,
    ):
        failure = error or (None if text else "no text in the answer")
        results.append(Result(text, first_s, first_s + sum(gaps_s), prompt, None, tokens, failure))
    return Load(results, found["duration"])
