"""vLLM, in a separate process and environment."""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from examples.vs_vllm.answer import Answer, FloatArray
from examples.vs_vllm.cases import Request
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError

WORKER = Path(__file__).with_name("vllm_worker.py")
KV_CACHE_GIB = 4


def engine_settings(checkpoint: Path, dtype: str, num_tokens: int) -> dict[str, Any]:
    """Return keyword arguments of ``vllm.LLM``: defaults, and settings for this comparison.

    Args:
        checkpoint: the model.
        dtype: dtype of weights and computation.
        num_tokens: length of the prompts; a step computes a complete prompt.
    """
    room = 1 << num_tokens.bit_length()
    return {
        "model": str(checkpoint),
        "dtype": dtype,
        "max_model_len": room,
        "max_num_batched_tokens": room,
        "max_num_seqs": 2,
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        "disable_log_stats": False,  # needed for times
        "max_logprobs": -1,
        "seed": 0,
    }


def other_photos(settings: Mapping[str, Any], vision_tokens: int) -> int:
    """Return the number of other photos that evict a photo from vLLM's encoder cache.

    By default its capacity is the maximum number of tokens of a step. The photo fills part of it: as many
    others as fit without it exceed the capacity.
    """
    return int(max(settings["max_num_batched_tokens"], vision_tokens) // vision_tokens)


def worker_variables(
    environment: Environment, cores: Sequence[int], base: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment variables of the worker.

    Args:
        environment: vLLM's environment.
        cores: processor numbers; one thread each.
        base: variables of this process; those that select Python packages are dropped.
    """
    kept = {name: value for name, value in base.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    wanted = {
        "PYTHONSAFEPATH": "1",  # the worker's folder has modules with common names
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        # The engine runs in the worker: no patches between processes, and hooks on its vision encoder.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(environment.folder / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if environment.openmp.exists():
        wanted["LD_PRELOAD"] = ":".join(filter(None, (str(environment.openmp), kept.get("LD_PRELOAD"))))
    return kept | wanted


class VllmPeer:
    """A running worker. Use it as a context manager.

    Attributes:
        facts: versions and threads, reported by the worker.

    Raises:
        PeerError: vLLM does not start; the message names the log.
    """

    def __init__(
        self,
        environment: Environment,
        settings: Mapping[str, Any],
        cores: Sequence[int],
        command: Sequence[str] = (),
    ) -> None:
        self._environment = environment
        self._log: IO[str] = environment.log.open("w", encoding="utf-8")
        try:
            self._worker = subprocess.Popen(
                list(command) or [str(environment.python), str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=environment.folder,
                env=worker_variables(environment, cores, os.environ),
            )
        except OSError as error:
            self._log.close()
            raise PeerError(f"cannot start vLLM: {error}") from error
        try:
            self.facts: dict[str, Any] = self._send(settings)
        except PeerError:
            self.close()
            raise

    def __enter__(self) -> "VllmPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def keeps(self) -> bool:
        """See ``Peer``."""
        return True

    def ask(self, request: Request) -> Answer:
        """See ``Peer``."""
        return self._answer(request, None)

    def logprobs(self, request: Request) -> FloatArray:
        """See ``Peer``."""
        path = self._environment.folder / "logprobs.npy"
        self._answer(request, path)
        found: FloatArray = np.load(path)
        return found

    def _answer(self, request: Request, logprobs: Path | None) -> Answer:
        # Absolute: the worker has another working directory.
        photo, target = str(request.photo.resolve()), None if logprobs is None else str(logprobs.resolve())
        reply = self._send({"ids": request.ids(1), "photo": photo, "logprobs": target})
        if reply["num_tokens"] != request.num_tokens:
            raise PeerError(f"vLLM counted {reply['num_tokens']} tokens in a prompt of {request.num_tokens}")
        computed = reply["num_tokens"] - reply["cached_tokens"]
        return Answer(
            reply["seconds"],
            reply["model_seconds"],
            reply["num_tokens"],
            computed,
            reply["encoder_runs"],
            "exact",
        )

    def _send(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps(message) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"vLLM has stopped; its output is in {self._environment.log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"vLLM failed: {reply['error']} (more in {self._environment.log})")
        return reply

    def close(self) -> None:
        """End the worker."""
        if self._worker.stdin is not None and not self._worker.stdin.closed:
            with contextlib.suppress(OSError):  # the worker has ended, with a request unread
                self._worker.stdin.close()
        try:
            self._worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        if self._worker.stdout is not None:
            self._worker.stdout.close()
        self._log.close()
