"""Parts of the handlers that the reference model does not reach: tools, and streams that fail."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import StreamingResponse

from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.handlers import ServedChat, ServedResponse, _edited
from vlcache_fx.serve.lengths import answer_length, check_prompt
from vlcache_fx.serve.options import ServeOptions

OPTIONS = ServeOptions(("reference",), max_output_tokens=100, max_prompt_tokens=60)


class Tokenizer:
    """Its model calls tools in a form that is not valid."""

    def __init__(self) -> None:
        self.response_template: dict[str, Any] = {"start_anchor": "x", "fields": {}}

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def parse_response(self, *_: Any, **__: Any) -> None:
        raise ValueError("json parser could not parse region as JSON.")


class Manager:
    """Has an answer."""

    stops = ()
    job = SimpleNamespace(row=SimpleNamespace(finish_reason="stop"), cached_tokens=3)
    answer = ("<tool_call>{", 5, [1, 2])

    async def generate_non_streaming(self, *_: Any, **__: Any) -> Any:
        return self.answer


def handler(kind: Any) -> Any:
    made = object.__new__(kind)
    made._manager, made._body = Manager(), {}
    return made


@pytest.mark.parametrize("kind", [ServedChat, ServedResponse])
def test_calls_of_tools_that_cannot_be_read_come_as_text(kind: Any) -> None:
    one = handler(kind)
    answered = one._answer(
        False,
        request_id="r",
        model=SimpleNamespace(config=SimpleNamespace(model_type="qwen2_vl")),
        processor=SimpleNamespace(tokenizer=Tokenizer()),
        model_id="m",
        inputs={"input_ids": [[1]]},
        gen_config=SimpleNamespace(max_new_tokens=9),
        gen_manager=one._manager,
        tools=None,
    )
    body = json.loads(asyncio.run(answered).body)
    if kind is ServedChat:
        assert body["choices"][0]["message"]["content"] == "<tool_call>{"
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    else:
        assert body["output"][0]["content"][0]["text"] == "<tool_call>{"
        assert body["usage"]["input_tokens_details"]["cached_tokens"] == 3


def test_errors_within_streams_are_objects() -> None:
    async def parts() -> Any:
        yield "data: {}\n\n"
        yield 'data: {}\n\ndata: {"error": "a path "quoted" """}\n\n'

    async def main() -> list[str]:
        one = handler(ServedChat)
        stream = _edited(StreamingResponse(parts()), lambda text: one._edit(text, "r1"))
        return [str(part) async for part in stream.body_iterator]

    first, second = asyncio.run(main())
    assert first == "data: {}\n\n"
    assert second.startswith("data: {}\n\n")
    error = json.loads(second.split("data: ")[-1])["error"]
    assert (error["code"], error["message"]) == ("model_failed", "the answer is not complete; request r1")


def test_lengths_of_prompts() -> None:
    check_prompt(60, OPTIONS, 100)
    for length, context in ((61, 100), (50, 50)):
        with pytest.raises(RequestError) as caught:
            check_prompt(length, OPTIONS, context)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("wanted", "context", "expected"),
    [(None, 4096, 100), (None, 60, 10), (None, None, 100), (7, 4096, 7), (10, 60, 10), (100, None, 100)],
)
def test_lengths_of_answers(wanted: int | None, context: int | None, expected: int) -> None:
    assert answer_length(wanted, 50, OPTIONS, context) == expected


@pytest.mark.parametrize(
    ("wanted", "context", "code"), [(101, None, None), (11, 60, "context_length_exceeded")]
)
def test_answers_that_are_too_long(wanted: int, context: int | None, code: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        answer_length(wanted, 50, OPTIONS, context)
    assert (caught.value.status, caught.value.code) == (400, code)
