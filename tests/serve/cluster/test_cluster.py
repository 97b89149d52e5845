"""Two replicas on Ray Serve, on the loopback address, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from openai import NotFoundError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from vlcache_fx.testing.reference_vlm import ask_again, load_model, load_processor, make_questions, prepare
from vlcache_fx.testing.reference_vlm.data import Question

from ..serving import messages_of
from .clusters import Cluster, command, running

pytest.importorskip("ray.serve", reason="needs the extra ray: pip install 'vlcache_fx[ray]'")

pytestmark = pytest.mark.slow

QUESTIONS = make_questions(count=6, system_words=8)
MODEL = "reference"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    stores = ("--store", "memory://", "--store", f"file://{folder}/donors")
    with running(folder, "--replicas", "2", *stores) as found:
        yield found


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=120) as found:
        yield found


@pytest.fixture(scope="module")
def expected() -> dict[int, str]:
    """The model's own answers to two questions about each picture."""
    model, processor = load_model(), load_processor()
    answers = {}
    for index, question in enumerate(asked()):
        inputs = prepare(processor, [question])
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers[index] = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def asked() -> list[Question]:
    """The questions, and then one more about each of their pictures."""
    rng = np.random.default_rng(0)
    again = [ask_again(question, rng, question_first=False, system_words=12) for question in QUESTIONS]
    return [*QUESTIONS, *again]


def ask(client: OpenAI, question: Question, **given: Any) -> tuple[str, str, int]:
    """The answer, the replica, and how many tokens were reused."""
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages_of(question), max_tokens=8, **given
    )
    answer = raw.parse()
    details = answer.usage.prompt_tokens_details
    return answer.choices[0].message.content, raw.headers["x-vlcache-replica"], details.cached_tokens


def metric(cluster: Cluster, name: str) -> dict[str, float]:
    """The values of a metric by replica."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx2.get(f"{cluster.url}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name == name:
                replica = sample.labels.get("replica", "")
                found[replica] = found.get(replica, 0) + sample.value
    return found


def test_answers_are_the_models_and_pictures_stay_with_a_replica(
    cluster: Cluster, client: OpenAI, expected: dict[int, str]
) -> None:
    questions = asked()
    first = [ask(client, question) for question in questions[:6]]
    second = [ask(client, question) for question in questions[6:]]
    answers = [answer for answer, _, _ in first + second]
    assert answers == list(expected.values())
    places = [replica for _, replica, _ in first]
    assert [replica for _, replica, _ in second] == places
    assert set(places) == set(cluster.health()), "both replicas work"
    assert all(cached == 0 for _, _, cached in first)
    assert all(cached > 0 for _, _, cached in second)


def test_first_requests_for_a_picture_meet(client: OpenAI) -> None:
    """They may part where a busy machine lets a replica answer late: not with each of three pictures."""
    meets = []
    for question in make_questions(count=9, system_words=8)[6:]:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _, one=question: ask(client, one), range(3)))
        assert len({answer for answer, _, _ in found}) == 1
        meets.append(len({replica for _, replica, _ in found}) == 1)
        computed = sum(cached == 0 for _, _, cached in found)
        assert computed == 1 if meets[-1] else computed >= 1
    assert any(meets)


def test_streams_and_errors_pass_through(cluster: Cluster, client: OpenAI, expected: dict[int, str]) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=messages_of(QUESTIONS[0]), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == expected[0]
    with pytest.raises(NotFoundError, match="not served here"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])
    answer = httpx2.get(f"{cluster.url}/v1/models", headers={"X-Request-Id": "mine"})
    assert answer.json()["data"][0]["id"] == MODEL
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_client_that_leaves_a_stream_ends_it(cluster: Cluster, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=messages_of(QUESTIONS[0]),
        stream=True,
        max_tokens=1000,
        logit_bias={str(load_model().generation_config.eos_token_id): -100},
    )
    with stream:
        for _, chunk in zip(range(4), stream, strict=False):
            assert chunk.choices[0].finish_reason is None
        assert sum(metric(cluster, "vlcache_serve_running").values()) == 1
    cluster.wait_until(lambda: sum(metric(cluster, "vlcache_serve_running").values()) == 0, timeout_s=10)


def test_metrics_are_those_of_all_replicas(cluster: Cluster) -> None:
    assert set(metric(cluster, "vlcache_serve_requests_total")) == set(cluster.health())
    assert metric(cluster, "vlcache_cluster_requests_total")[""] > 0


@pytest.mark.thorough
def test_a_replica_that_is_killed_loses_nothing(
    cluster: Cluster, client: OpenAI, expected: dict[int, str]
) -> None:
    """Requests that it was answering begin anew elsewhere, and the next replica finds the donors."""
    before = cluster.health()
    questions = asked()
    is_over = threading.Event()
    wrong: list[Any] = []
    places: set[str] = set()

    def load(seed: int) -> int:
        count = 0
        while not is_over.is_set():
            index = (seed + 5 * count) % len(questions)
            answer, replica, _ = ask(client, questions[index])
            places.add(replica)
            if answer != expected[index]:
                wrong.append((index, answer))
            count += 1
            time.sleep(0.1)  # the next replica needs the cores, too
        return count

    with ThreadPoolExecutor(4) as pool:
        counts = [pool.submit(load, seed) for seed in range(4)]
        try:
            cluster.wait_until(lambda: places == set(before))
            os.kill(cluster.pids[before[0]], signal.SIGKILL)
            cluster.wait_until(lambda: len(set(cluster.health()) - set(before)) == 1)
        finally:
            is_over.set()
        assert sum(count.result() for count in counts) > len(questions)
    assert wrong == []
    assert metric(cluster, "vlcache_cluster_lost_total")[""] == 0

    # Without the old ones, all goes to the new one, which never computed these pictures.
    os.kill(cluster.pids[before[1]], signal.SIGKILL)
    (new,) = set(cluster.health()) - set(before)
    found = [ask(client, question) for question in QUESTIONS]
    assert [answer for answer, _, _ in found] == list(expected.values())[:6]
    assert {replica for _, replica, _ in found} == {new}
    assert all(cached > 0 for _, _, cached in found)


def test_it_stops_with_all_that_it_started(cluster: Cluster) -> None:
    children = psutil.Process(cluster.process.pid).children(recursive=True)
    assert children
    assert cluster.stop() == 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    # Ray's controller logs that a killed replica does not answer; the others have no errors.
    assert [line for line in cluster.lines if "Traceback" in line and "ServeController" not in line] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere", "--replicas", "2"), "no model '/nowhere'"),
        ((MODEL, "--replicas", "0"), "replicas=0 is not valid"),
        ((MODEL, "--max-replicas", "2"), "--max-replicas and --ray-address need --replicas"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    found = subprocess.run(command(*arguments), check=False, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
