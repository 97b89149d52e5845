"""What a library is asked and answers, whichever it is."""

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from examples.vs_vllm.cases import Request

FloatArray = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request, answered.

    Attributes:
        seconds: from the photo's pixels (bytes) and the ids to the first token.
        model_seconds: of these, from the patches to the first token: without cutting the photo up, and with
            vLLM without its queue.
        num_tokens: length of the prompt, vision tokens included.
        computed_tokens: rows that the first decoder layer computed; the others came from a cache.
        encoder_runs: how often the vision tower ran.
        reuse: in words, how what was not computed relates to computing it.
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
        """Whether it keeps anything between requests."""

    def ask(self, request: Request) -> Answer:
        """Answer with one token. Raises ``PeerError`` where it cannot."""

    def logprobs(self, request: Request) -> FloatArray:
        """The same, but the natural logarithms of the first token's probabilities ``[vocabulary]``."""

    def close(self) -> None:
        """Release the model."""
