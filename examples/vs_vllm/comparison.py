"""Ask every library the same rounds in turn, and gather what they answer."""

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
"""The first one also compares logits; the second runs once more what its first call has just compiled."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a first token's distribution is from that of the unmodified model, run eagerly.

    Attributes:
        largest: largest difference of two log-probabilities, in nats, over the whole vocabulary.
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
            PeerError: they are of different vocabularies.
        """
        if expected.shape != found.shape:
            raise PeerError(f"log-probabilities of {expected.size} and {found.size} tokens")
        # In double precision: the divergence is a small sum of large terms.
        p, q = expected.astype(np.float64), found.astype(np.float64)
        divergence = float((np.exp(p) * (p - q)).sum())
        return cls(float(np.abs(p - q).max()), divergence, bool(p.argmax() == q.argmax()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        num_tokens, vision_tokens: of every request.
        answers: per case and library, one per round; those that keep nothing take part in ``first`` alone.
        differences: per case and library, in the first warm-up round.
        other_photo, other_system: of the unmodified model's first request, from the same with another photo
            or another system prompt: how large a difference is when something else was asked.
    """

    num_tokens: int
    vision_tokens: int
    answers: dict[str, dict[str, list[Answer]]]
    differences: dict[str, dict[str, Difference]]
    other_photo: Difference
    other_system: Difference

    def seconds(self, case: str, name: str, *, patches: bool = False) -> list[float]:
        """Seconds to the first token per round, from the pixels or from the patches."""
        return [one.model_seconds if patches else one.seconds for one in self.answers[case][name]]

    def ratio(self, case: str, name: str, *, patches: bool = False) -> Summary:
        """Seconds of vLLM over those of ``name``, within each round."""
        return paired_ratio(
            self.seconds(case, VLLM, patches=patches), self.seconds(case, name, patches=patches)
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form, with the ratios."""
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
        peers: by name; vLLM and the unmodified model among them.
        script: what is asked.
        rounds: timed rounds, at least 1.
        say: is told what happens.

    Raises:
        PeerError: a library failed, or a request did not do what its case says.
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
        # In turn, case by case: whatever else the machine does hits all of them alike.
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
    # As long as the first one's, so that nothing but the words differs.
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
            f"{name}: of a new photo {answer.computed_tokens} of {answer.num_tokens} rows were computed, with"
            f" {answer.encoder_runs} encoder runs"
        )
    if case == "evicted" and name == VLLM and answer.encoder_runs == 0:
        raise PeerError("vLLM still had the photo's encoder entry after the other photos had passed")
