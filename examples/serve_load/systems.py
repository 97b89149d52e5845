"""Servers to compare, each a process of its own in one environment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from examples.vs_vllm.remote import worker_variables

READY_S = 900


@dataclass(frozen=True)
class System:
    """A server.

    Attributes:
        name: name in tables.
        command: its command line after the environment's ``bin/``; ``{model}`` and ``{port}`` are filled in.
        ready: path that answers 200 when it takes requests.
        extra_body: fields of each request.
        served_name: the model's name in requests; None for its folder.
    """

    name: str
    command: Sequence[str]
    ready: str = "/health"
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    served_name: str | None = None


TRANSFORMERS_SERVE = """
import io
import PIL.Image
import transformers.image_utils
from torchvision.transforms.functional import pil_to_tensor
from transformers.cli.transformers import main

def decode_image(data, mode):
    return pil_to_tensor(PIL.Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))

transformers.image_utils.decode_image = decode_image
main()
"""
"""Pillow decodes pictures: the compiled half of the published torchvision needs the CUDA build of torch."""

OURS = ("vlcache", "serve", "model={model}", "--port", "{port}", "--batch-size")
SYSTEMS = (
    System("vlcache", (*OURS, "{batch}"), served_name="model"),
    System("vlcache, no batches", (*OURS, "1"), served_name="model"),
    System("vlcache, no reuse", (*OURS, "{batch}", "--no-reuse"), served_name="model"),
    System("vLLM", (
        # Not its command line, which wants a package named vllm: that for CPUs has another name.
        "python", "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}",
        "--port", "{port}", "--max-model-len", "4096", "--max-num-seqs", "{batch}",
        "--limit-mm-per-prompt", '{"image": 8}',
        "--mm-encoder-attn-backend", "TORCH_SDPA", "--enable-prompt-tokens-details",
    )),
    System("transformers serve", (
        "python", "-c", TRANSFORMERS_SERVE, "serve", "{model}", "--port", "{port}", "--device", "cpu",
    )),
)  # fmt: skip


@contextmanager
def serving(
    system: System, model: Path, port: int, environment: Environment, cores: Sequence[int], batch: int
) -> Iterator[str]:
    """Run a server in the body; yield its URL when it is ready.

    Raises:
        PeerError: it ended, or did not get ready; the message names its log.
    """
    values = {"{model}": str(model), "{port}": str(port), "{batch}": str(batch)}
    filled = [_filled(part, values) for part in system.command]
    command = [str(environment.venv / "bin" / filled[0]), *filled[1:]]
    log = log_of(system, environment)
    variables = worker_variables(environment, cores, os.environ)
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]  # it is for engines inside a worker
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=environment.folder,
            start_new_session=True,
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}{system.ready}", system.name, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(server)


def log_of(system: System, environment: Environment) -> Path:
    """The file with a server's output."""
    return environment.folder / f"{system.name.replace(' ', '-').replace(',', '')}.log"


def _filled(part: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(name, value)
    return part


def _wait(server: subprocess.Popen[bytes], url: str, name: str, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise PeerError(f"{name} ended with status {server.returncode}; its output is in {log}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise PeerError(f"{name} was not ready after {READY_S} s; its output is in {log}")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers."""
    for sign, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            return
        try:
            server.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
