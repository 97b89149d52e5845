"""Runs the same rounds with every library in turn, and collects the answers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from examples.vs_vllm.answer import Answer, FloatArray, Peer
from examples.vs_vllm.cases import CASES, Round, Script
from examples.vs_vllm.errors import PeerError
from vlcache_fx.bench.rounds import Summary, paired_ratio

VLLM, VLCACHE, EAGER, COMPILED = "vllm", "vlcache", "eager", "compiled"
WARM_UP_ROUNDS = 2
"""The first round also compares logits; the second repeats the calls after their compilation."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of a first token's distribution from the unmodified eager model's.

    Attributes:
        largest: largest difference of log-probabilities over the vocabulary, in nats.
        divergence: Kullback-Leibler divergence from the unmodified model's, in nats.
        same_token: whether the likeliest token is the same.
    """

    largest: float
    divergence: float
    same_token: bool

    @classmethod
    def between(cls, expected: FloatArray, found: FloatArray) -> "Difference":
        """Compare two ``[vocabulary]`` log-probabilities.

        Raises:
            PeerError: the vocabularies differ.
        """
        if expected.shape != found.shape:
            raise PeerError(f"log-probabilities of {expected.size} and {found.size} tokens")
        # In double precision: the divergence is a small sum of large terms.
        p, q = expected.astype(np.float64), found.astype(np.float64)
        divergence = float((np.exp(p) * (p - q)).sum())
        return cls(float(np.abs(p - q).max()), divergence, bool(p.argmax() == q.argmax()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of the comparison.

    Attributes:
        num_tokens, vision_tokens: tokens of every request.
        answers: case -> library -> answers per round; libraries without caches only run ``first``.
        differences: case -> library -> difference in the first warm-up round.
        other_photo, other_system: differences of the unmodified model's first request from a request with
            another photo or system prompt: a scale for ``differences``.
    """

    num_tokens: int
    vision_tokens: int
    answers: dict[str, dict[str, list[Answer]]]
    differences: dict[str, dict[str, Difference]]
    other_photo: Difference
    other_system: Difference

    def seconds(self, case: str, name: str, *, patches: bool = False) -> list[float]:
        """Return the seconds to the first token per round, from the pixels or from the patches."""
        return [answer.model_seconds if patches else answer.seconds for answer in self.answers[case][name]]

    def ratio(self, case: str, name: str, *, patches: bool = False) -> Summary:
        """Return the ratio of vLLM's seconds to those of ``name`` within each round."""
        return paired_ratio(
            self.seconds(case, VLLM, patches=patches), self.seconds(case, name, patches=patches)
        )

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict with the ratios."""
        ratios = {
            case: {
                name: {
                    "pixels": dataclasses.asdict(self.ratio(case, name)),
                    "patches": dataclasses.asdict(self.ratio(case, name, patches=True)),
                }
                for name in found
            }
            for case, found in self.answers.items()
        }
        return dataclasses.asdict(self) | {"vllm_over": ratios}


def compare(
    peers: Mapping[str, Peer], script: Script, rounds: int, say: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Warm up and compare logits, then time ``rounds`` rounds.

    Args:
        peers: libraries by name, with vLLM and the unmodified model.
        script: the requests.
        rounds: timed rounds, at least 1.
        say: receives progress messages.

    Raises:
        PeerError: a library failed, or a request did not match its case.
    """
    say("warming up, and comparing logits")
    first = script.round(0)
    differences = _check(peers, first)
    other_photo, other_system = _scales(peers[EAGER], first)
    for number in range(1, WARM_UP_ROUNDS):
        _time(peers, script.round(number))
    answers: dict[str, dict[str, list[Answer]]] = {case: {} for case in CASES}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for case, found in _time(peers, script.round(WARM_UP_ROUNDS + number)).items():
            for name, answer in found.items():
                _verify(case, name, answer)
                answers[case].setdefault(name, []).append(answer)
    num_tokens = first.cases["first"].num_tokens
    return Comparison(num_tokens, script.vision_tokens, answers, differences, other_photo, other_system)


def _time(peers: Mapping[str, Peer], asked: Round) -> dict[str, dict[str, Answer]]:
    answers: dict[str, dict[str, Answer]] = {}
    for case, request in asked.cases.items():
        _pass_others(case, peers, asked)
        # In turn, case by case: disturbances of the machine affect all libraries.
        answers[case] = {
            name: peer.ask(request) for name, peer in peers.items() if peer.keeps or case == "first"
        }
    return answers


def _check(peers: Mapping[str, Peer], asked: Round) -> dict[str, dict[str, Difference]]:
    differences: dict[str, dict[str, Difference]] = {}
    for case, request in asked.cases.items():
        _pass_others(case, peers, asked)
        expected = peers[EAGER].logprobs(request)
        differences[case] = {
            name: Difference.between(expected, peer.logprobs(request))
            for name, peer in peers.items()
            if name != EAGER and (peer.keeps or case == "first")
        }
    return differences


def _scales(unmodified: Peer, asked: Round) -> tuple[Difference, Difference]:
    first = asked.cases["first"]
    expected = unmodified.logprobs(first)
    photo = dataclasses.replace(first, photo=asked.others[0].photo)
    # Equal length: only the words differ.
    system = dataclasses.replace(first, before=asked.others[0].before)
    return (
        Difference.between(expected, unmodified.logprobs(photo)),
        Difference.between(expected, unmodified.logprobs(system)),
    )


def _pass_others(case: str, peers: Mapping[str, Peer], asked: Round) -> None:
    if case == "evicted":
        for peer in peers.values():
            for request in asked.others if peer.keeps else ():
                peer.ask(request)


def _verify(case: str, name: str, answer: Answer) -> None:
    if case == "first" and (answer.computed_tokens != answer.num_tokens or answer.encoder_runs != 1):
        raise PeerError(
            f"{name}: a request with a new photo computed {answer.computed_tokens} of {answer.num_tokens}"
            f" rows, with {answer.encoder_runs} encoder runs"
        )
    if case == "evicted" and name == VLLM and answer.encoder_runs == 0:
        raise PeerError("vLLM's encoder cache still contains the photo after the other photos")
