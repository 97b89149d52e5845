"""Common interface of the compared libraries."""

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from examples.vs_vllm.cases import Request

FloatArray = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request.

    Attributes:
        seconds: time from the photo's pixels (bytes) and the ids to the first token.
        model_seconds: time from the patches to the first token, without vLLM's queue.
        num_tokens: length of the prompt, with vision tokens.
        computed_tokens: rows that the first decoder layer computed; the others came from a cache.
        encoder_runs: number of runs of the vision encoder.
        reuse: whether the result is exact, in words.
    """

    seconds: float
    model_seconds: float
    num_tokens: int
    computed_tokens: int
    encoder_runs: int
    reuse: str


class Peer(Protocol):
    """A library with a model loaded."""

    @property
    def keeps(self) -> bool:
        """Whether it caches anything between requests."""

    def ask(self, request: Request) -> Answer:
        """Generate one token. Raises ``PeerError`` on failure."""

    def logprobs(self, request: Request) -> FloatArray:
        """Return the natural logarithms of the first token's probabilities ``[vocabulary]``."""

    def close(self) -> None:
        """Release the model."""
