"""Bodies that are refused, with the field and what is valid."""

from __future__ import annotations

from typing import Any

import pytest

from vlcache_fx.serve.bodies import check_chat, check_response
from vlcache_fx.serve.errors import RequestError

USER = {"role": "user", "content": "hello"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def chat(**given: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **given}


def user(*content: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": list(content)}])


@pytest.mark.parametrize(
    "body",
    [
        chat(),
        chat(n=1, temperature=0, top_p=1, max_tokens=1, seed=0, stop="x", stream=True, user="someone"),
        chat(
            temperature=0.5, stop=["a", "b"], stream_options={"include_usage": True}, logit_bias={"1": -100}
        ),
        chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="auto"),
        chat(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]),
        chat(response_format={"type": "text"}, chat_template_kwargs={"enable_thinking": False}),
        user({"type": "text", "text": "a"}, PICTURE),
    ],
)
def test_valid_chats(body: dict[str, Any]) -> None:
    assert check_chat(body) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "model is not valid: field required"),
        (chat(model=3), "model=3"),
        (chat(messages=None), "messages"),
        (chat(messages="hello"), "messages='hello'"),
        (chat(messages=[]), "messages is not valid: list should have at least 1 item"),
        (chat(messages=["hello"]), "messages[0]='hello'"),
        (chat(messages=[{"content": "a"}]), "messages[0].role"),
        (chat(messages=[{"role": "robot", "content": "a"}]), "messages[0].role='robot'"),
        (chat(messages=[{"role": "user", "content": 3}]), "messages[0].content=3"),
        (user("a"), "messages[0].content[0]='a'"),
        (user({"type": "text"}), "messages[0].content[0].text is not valid: field required"),
        (user({"type": "text", "text": 3}), "messages[0].content[0].text=3"),
        (user({"type": "image_url", "image_url": "data:,"}), "messages[0].content[0].image_url='data:,'"),
        (user({"type": "video_url", "video_url": {"url": "x"}}), "'video_url' found"),
        (user({"type": "input_audio", "input_audio": {"data": "x"}}), "'input_audio' found"),
        (
            chat(messages=[{"role": "assistant", "tool_calls": [{"function": {}}]}]),
            "tool_calls[0].function.name",
        ),
        (chat(n=2), "n=2"),
        (chat(stream="yes"), "stream='yes'"),
        (chat(temperature=-1), "temperature=-1"),
        (chat(temperature=float("nan")), "temperature=nan"),
        (chat(temperature="hot"), "temperature='hot'"),
        (chat(top_p=0), "top_p=0"),
        (chat(max_tokens=0), "max_tokens=0"),
        (chat(max_tokens=1.5), "max_tokens=1.5"),
        (chat(max_tokens=True), "max_tokens=True"),
        (chat(max_completion_tokens=-4), "max_completion_tokens=-4"),
        (chat(seed=-1), "seed=-1"),
        (chat(stop=["a"] * 5), "stop"),
        (chat(frequency_penalty=-1.5), "frequency_penalty=-1.5"),
        (chat(presence_penalty=0.5), "presence_penalty=0.5"),
        (chat(logit_bias={"1": 1000}), "logit_bias"),
        (chat(logprobs=True), "logprobs=True"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        (chat(tool_choice="required"), "tool_choice='required'"),
        (chat(generation_config="{}"), "generation_config='{}'"),
        (chat(chat_template_kwargs={"images": True}), "chat_template_kwargs"),
    ],
)
def test_bad_chats(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_chat(body)
    assert caught.value.status == 400
    assert message in caught.value.message
    assert caught.value.param is None or "[" not in caught.value.param


ITEM = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}


@pytest.mark.parametrize(
    "given",
    [
        {"input": "hello", "instructions": "be brief", "max_output_tokens": 3},
        {"input": [ITEM]},
        {"input": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "data:,"}]},
        {"input": [ITEM, {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}]},
    ],
)
def test_valid_responses(given: dict[str, Any]) -> None:
    assert check_response({"model": "m", **given}) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "input is not valid: field required"),
        ({"input": 3}, "input=3"),
        ({"input": []}, "input is empty"),
        ({"input": [3]}, "input[0]=3"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role='robot'"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens=0"),
        ({"input": "a", "previous_response_id": "r"}, "previous_response_id='r'"),
        ({"input": "a", "background": True}, "background=True"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
def test_bad_responses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_response({"model": "m", **given})
    assert message in caught.value.message
