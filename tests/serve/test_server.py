"""The whole server with the reference model, asked by the client of OpenAI."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.testing.reference_vlm import ask_again, load_model, make_questions, prepare

from ..examples.loading import load as load_example
from .serving import Running, messages_of, running, urls_of

MODEL = "reference"
QUESTIONS = make_questions(count=12, system_words=8)
NO_REUSE = {"vlcache": {"bypass": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    options = ServeOptions(
        (MODEL,),
        port=0,
        engine={"lowering": "eager"},
        batch_size=4,
        max_waiting=6,
        max_body_bytes=300_000,
        max_images=2,
        max_prompt_tokens=400,
        media_folders=(folder,),
        api_keys=("alice", "bob"),
        salt_from_api_key=True,
    )
    with running(options) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as found:
        yield found


def client_of(server: Running, key: str = "alice") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def ask(client: OpenAI, question: Any, **given: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages_of(question), **given)


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def post(server: Running, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": "Bearer alice", "Content-Type": "application/json", **headers}
    return httpx2.post(server.url + path, content=content, headers=sent, timeout=120)


@contextmanager
def model_is_busy(server: Running, client: OpenAI) -> Iterator[None]:
    """While a first request holds the model: others wait."""
    lock = server.server.service.state._sampling
    with ThreadPoolExecutor(1) as pool:
        with lock:
            first = pool.submit(ask, client, QUESTIONS[11], temperature=1.0, max_tokens=1)
            wait_for(server, "vlcache_serve_running", 1)
            yield
        assert first.result().usage.completion_tokens == 1


def metric(server: Running, name: str) -> float:
    for family in text_string_to_metric_families(httpx2.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                return float(sample.value)
    return 0.0


def wait_for(server: Running, name: str, value: float) -> None:
    wait_until(lambda: metric(server, name) == value)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


def expected(server: Running, question: Any) -> str:
    """The answer of ``model.generate`` without a server and without reuse."""
    model, processor = server.server.service.models.load_model_and_processor(MODEL)
    inputs = prepare(processor, [question])
    with model.vlcache.using(salt="expected"):
        tokens = model.generate(**inputs, max_new_tokens=8)
    model.vlcache.clear(salt="expected")
    return str(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_not_ready_before_the_models_are_compiled(server: Running) -> None:
    before = server.first_answers
    assert (before["health"].status_code, before["health"].json()["status"]) == (503, "starting")
    assert before["live"].status_code == 200
    assert (before["chat"].status_code, before["chat"].json()["error"]["code"]) == (503, "not_ready")
    assert before["chat"].headers["retry-after"] == "5"
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok", "models": {MODEL: "ready"}}
    # Donors of the examples are dropped.
    assert server.server.service.models.engines[MODEL].store.stats().entries == 0


def test_answers_equal_those_of_the_model(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[0]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages_of(question), extra_headers={"X-Request-Id": "ask-1"}
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == expected(server, question)
    assert (answer.model, answer.id, answer.choices[0].finish_reason) == (MODEL, "ask-1", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert cached(answer) == 0
    assert raw.headers["x-request-id"] == "ask-1"
    steps = {part.partition(";")[0] for part in raw.headers["server-timing"].split(", ")}
    assert steps >= {"prepare", "queue", "prefill", "decode", "identify", "run"}


def test_second_question_reuses_the_picture(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[1]
    assert cached(ask(client, question)) == 0
    again = replace(
        ask_again(question, np.random.default_rng(0), question_first=False, system_words=12),
        system_prompt="today the office is open from early morning until late at night .",
    )
    picture_tokens = question.digits[0].size
    answer = ask(client, again)
    assert picture_tokens * 0.9 <= cached(answer) <= picture_tokens
    assert answer.choices[0].message.content == expected(server, again)


def test_streams(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[2]
    ask(client, question)
    chunks = list(ask(client, question, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(server, question)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert cached(chunks[-1]) > 100
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in ask(client, question, stream=True))


def test_stream_ends_as_that_of_openai(server: Running) -> None:
    body = {"model": MODEL, "messages": messages_of(QUESTIONS[2]), "stream": True}
    response = post(server, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "prefill;dur=" in response.headers["server-timing"]
    assert response.text.endswith("data: [DONE]\n\n")


def test_responses(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[3]
    content = [
        {"type": "input_image", "image_url": urls_of(question)[0]},
        {"type": "input_text", "text": question.text},
    ]
    given: dict[str, Any] = {
        "model": MODEL,
        "instructions": question.system_prompt,
        "input": [{"role": "user", "content": content}],
    }
    first = client.responses.create(**given)
    assert (first.output_text, first.status) == (expected(server, question), "completed")
    assert first.usage is not None
    assert first.usage.input_tokens_details.cached_tokens == 0
    events = list(client.responses.create(**given, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
        first.output_text
    )
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage is not None
    assert events[-1].response.usage.input_tokens_details.cached_tokens > 100
    short = client.responses.create(**given, max_output_tokens=1)
    assert short.status == "incomplete"
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    events = list(client.responses.create(**given, max_output_tokens=1, stream=True))
    assert events[-1].type == "response.incomplete"


def test_bypass_reuses_nothing_and_leaves_nothing(server: Running, client: OpenAI) -> None:
    engine = server.server.service.models.engines[MODEL]
    ask(client, QUESTIONS[4])
    before = engine.store.stats().entries
    answer = ask(client, QUESTIONS[4], extra_body=NO_REUSE)
    assert cached(answer) == 0
    wait_until(lambda: engine.store.stats().entries == before)
    assert cached(ask(client, QUESTIONS[4])) > 100


def test_settings_of_a_request(client: OpenAI) -> None:
    question = QUESTIONS[5]
    first = ask(client, question)
    other_prompt = replace(question, system_prompt="you read scanned pages and answer with one word .")
    none = ask(client, other_prompt, extra_body={"vlcache": {"budget": 0.0, "policy": "none"}})
    full = ask(client, other_prompt, extra_body={"vlcache": {"budget": 1.0, "policy": "full"}})
    assert cached(first) == 0
    assert cached(none) > cached(full)
    own = ask(client, question, extra_body={"vlcache": {"salt": "mine"}})
    assert cached(own) == 0
    assert cached(ask(client, question, extra_body={"vlcache": {"salt": "mine"}})) > 100


def test_tenants_share_no_donors(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[6]
    ask(client, question)
    with client_of(server, "bob") as other:
        assert cached(ask(other, question)) == 0
        assert cached(ask(other, question)) > 100
        for salt in ("alice", "", "bob"):
            other_picture = ask(other, QUESTIONS[0], extra_body={"vlcache": {"salt": salt}})
            assert cached(other_picture) == 0
    assert cached(ask(client, question)) > 100


def test_batches_answer_as_alone(server: Running, client: OpenAI) -> None:
    questions = QUESTIONS[7:11]
    alone = [ask(client, question, extra_body=NO_REUSE).choices[0].message.content for question in questions]
    sizes = metric(server, "vlcache_serve_batch_size_sum"), metric(server, "vlcache_serve_batch_size_count")
    with ThreadPoolExecutor(4) as pool:
        with model_is_busy(server, client):
            waiting = [
                pool.submit(ask, client, question, extra_body=NO_REUSE, max_tokens=length)
                for question, length in zip(questions, (8, 1, 2, 8), strict=True)
            ]
            wait_for(server, "vlcache_serve_waiting", 4)
        found = [each.result() for each in waiting]
    assert [answer.choices[0].message.content for answer in found] == alone
    assert [answer.choices[0].finish_reason for answer in found] == ["stop", "length", "stop", "stop"]
    assert metric(server, "vlcache_serve_batch_size_sum") - sizes[0] == 5
    assert metric(server, "vlcache_serve_batch_size_count") - sizes[1] == 2


def test_full_queue(server: Running, client: OpenAI) -> None:
    with ThreadPoolExecutor(6) as pool:
        with model_is_busy(server, client):
            waiting = [pool.submit(ask, client, QUESTIONS[0]) for _ in range(6)]
            wait_for(server, "vlcache_serve_waiting", 6)
            with pytest.raises(openai.RateLimitError) as caught:
                ask(client, QUESTIONS[0])
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "queue_full"
        assert {each.result().choices[0].finish_reason for each in waiting} == {"stop"}


def test_clients_that_leave(server: Running, client: OpenAI) -> None:
    """Those who wait are dropped; nothing of them runs."""
    batches = metric(server, "vlcache_serve_batch_size_count")
    with model_is_busy(server, client):
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=1.0), QUESTIONS[1], stream=stream)
            wait_for(server, "vlcache_serve_waiting", 0)
    assert metric(server, "vlcache_serve_batch_size_count") == batches + 1


def test_seeds(client: OpenAI) -> None:
    def said(seed: int, prompt: str = "archive paper report") -> str | None:
        messages: Any = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(
            model=MODEL, messages=messages, seed=seed, temperature=2.0, max_tokens=8
        )
        return answer.choices[0].message.content

    found = [said(seed) for seed in (5, 5, 6, 7, 8)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_bias_and_extreme_temperatures(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[0]
    processor = server.server.service.models.load_model_and_processor(MODEL)[1]
    word = processor.tokenizer.convert_tokens_to_ids("archive")
    assert (
        ask(client, question, logit_bias={str(word): 100}, max_tokens=1).choices[0].message.content
        == "archive"
    )
    assert ask(client, question, logit_bias={}).choices[0].message.content == expected(server, question)
    for bias in ({"one": 1}, {"-1": 1}, {"999999": 1}, {"9" * 5000: 1}):
        with pytest.raises(openai.BadRequestError, match="its names must be token ids"):
            ask(client, question, logit_bias=bias)
    cold = ask(client, question, temperature=1e-40, top_p=1e-9, frequency_penalty=-0.9, max_tokens=1)
    assert cold.usage.completion_tokens == 1


def test_stop_strings(server: Running, client: OpenAI) -> None:
    question = QUESTIONS[0]
    answer = expected(server, question)
    stopped = ask(client, question, stop=[answer])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    chunks = list(ask(client, question, stop=answer, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


def test_text_without_pictures(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
    )
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_files_of_allowed_folders(client: OpenAI, folder: Path) -> None:
    QUESTIONS[0].images[0].save(folder / "sheet.png")
    messages = messages_of(QUESTIONS[0])
    picture = messages[1]["content"][0]["image_url"]
    by_value = ask(client, QUESTIONS[0])
    picture["url"] = f"file://{folder}/sheet.png"
    by_name = client.chat.completions.create(model=MODEL, messages=messages)
    assert by_name.choices[0].message.content == by_value.choices[0].message.content
    assert cached(by_name) > 100  # the same pixels are the same picture


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/",
        "/etc/passwd",
        "data:image/png;base64,AAAA",
        "data:;base64,*",
    ],
)
def test_pictures_that_are_refused(server: Running, url: str) -> None:
    messages = messages_of(QUESTIONS[0])
    messages[1]["content"][0]["image_url"]["url"] = url
    response = post(server, {"model": MODEL, "messages": messages})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "image_url")
    assert "root:" not in response.text


def test_limits(server: Running, client: OpenAI) -> None:
    long = replace(QUESTIONS[0], system_prompt="rule " * 500)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, long)
    assert caught.value.code == "context_length_exceeded"
    assert "the longest is 400" in caught.value.message
    for tokens, words in ((5000, "max_output_tokens is 4096"), (4000, "exceed the model's 4096")):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, QUESTIONS[0], max_tokens=tokens)
    with pytest.raises(openai.APIStatusError) as too_large:
        ask(client, replace(QUESTIONS[0], system_prompt="a" * 400_000))
    assert too_large.value.status_code == 413
    three = replace(QUESTIONS[0], images=QUESTIONS[0].images * 3)
    with pytest.raises(openai.BadRequestError, match="3 pictures are too many"):
        ask(client, three)
    odd = replace(QUESTIONS[0], images=(QUESTIONS[0].images[0].crop((0, 0, 75, 80)),))
    with pytest.raises(openai.BadRequestError, match="sides must be multiples of 8"):
        ask(client, odd)
    with pytest.raises(openai.BadRequestError, match="text must not contain"):
        ask(client, replace(QUESTIONS[0], text="what is <|image_pad|> ?"))


DEEP = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"\xff\xfe",
        DEEP,
        {},
        {"model": None},
        {"model": MODEL},
        {"model": MODEL, "messages": {}},
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}]},
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": -1},
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "vlcache": {"budget": "all"}},
        {"model": MODEL, "messages": [{"role": "user", "content": "\ud800"}], "stream": "\ud800"},
        {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "surprise": 1},
        {
            "model": MODEL,
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
            ],
        },
        {"model": "\ud800", "messages": [{"role": "user", "content": "a"}]},
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_malformed_bodies(server: Running, path: str, body: Any) -> None:
    response = post(server, body, path)
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert error["message"]
    for secret in ("Traceback", "site-packages", "vlcache_fx/"):
        assert secret not in response.text


def test_other_models_keys_and_routes(server: Running, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' is not served here: reference"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    with client_of(server, "mallory") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-4")
    for path in (
        "/load_model",
        "/reset",
        "/v1/audio/transcriptions",
        "/v1/systemone",
        "/docs",
        "/openapi.json",
    ):
        for method in ("GET", "POST"):
            response = httpx2.request(method, server.url + path, headers={"Authorization": "Bearer alice"})
            assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    assert (
        httpx2.get(f"{server.url}/v1/chat/completions", headers={"Authorization": "Bearer alice"}).status_code
        == 405
    )


def test_request_ids(server: Running) -> None:
    headers = {"X-Request-Id": "a b\tc" + "x" * 300}
    found = httpx2.get(f"{server.url}/live", headers=headers).headers["x-request-id"]
    assert len(found) == 36
    assert (
        httpx2.get(f"{server.url}/live", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    )


def test_example_of_the_manual(server: Running) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python [^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace("unused", "bob")
    names: dict[str, Any] = {}
    exec(code, names)
    names["client"].close()
    assert cached(names["second"]) > 90


def test_metrics(server: Running, client: OpenAI) -> None:
    ask(client, QUESTIONS[0])
    text = httpx2.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    served = {sample.labels["path"]: sample for sample in families["vlcache_serve_requests"].samples}
    assert served["/v1/chat/completions"].value > 0
    assert {"vlcache_requests", "vlcache_store_bytes", "vlcache_serve_time_to_first_token_seconds"} <= set(
        families
    )
    assert {sample.labels["model"] for sample in families["vlcache_requests"].samples} == {MODEL}
    assert "alice" not in text


def test_both_names_of_the_longest_answer(client: OpenAI) -> None:
    eos = load_model().generation_config.eos_token_id
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, QUESTIONS[0], logit_bias={str(eos): -100}, **{name: 3})
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"
    answer = ask(client, QUESTIONS[0], logit_bias={str(eos): -100}, max_tokens=5, max_completion_tokens=2)
    assert answer.usage.completion_tokens == 2  # the newer name counts


def test_the_example_asks_about_one_picture(
    server: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.server.service.models.engines[MODEL].clear()
    monkeypatch.setenv("OPENAI_API_KEY", "bob")
    record = tmp_path / "terminal.svg"
    answers = load_example("ask_the_server").main(at=f"{server.url}/v1", record=record)
    assert {answer.text for answer in answers} == {make_questions(count=1)[0].answer}
    assert answers[0].cached_tokens == 0
    assert all(0 < answer.cached_tokens < answer.prompt_tokens for answer in answers[1:])
    assert all(answer.first_token_ms > 0 for answer in answers)
    assert "reused" in record.read_text()


def test_shutdown(server: Running, client: OpenAI) -> None:
    """Last: what runs is answered, what comes is refused, and the engines are closed."""
    engine = server.server.service.models.engines[MODEL]
    with ThreadPoolExecutor(2) as pool:
        lock = server.server.service.state._sampling
        with lock:
            last = pool.submit(ask, client, QUESTIONS[0], temperature=0.1, max_tokens=2)
            wait_for(server, "vlcache_serve_running", 1)
            with client_of(server) as other:
                other.models.list()  # a connection that stays open
                server.server.stop()
                with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                    other.models.list()
        assert last.result().choices[0].message.content
    server.thread.join(60)
    assert not server.thread.is_alive()
    assert server.failure is None
    assert engine._closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vlcache-serve")]
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/live")
