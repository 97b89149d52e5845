"""The bodies of requests that this server can answer. Others are refused, never half understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlcache_fx.serve.errors import RequestError, bad_request

MAX_STOPS = 4
MAX_SEED = 2**63 - 1


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Text(_Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _Url(_Body):
    url: str


class _ImageUrl(_Body):
    type: Literal["image_url"]
    image_url: _Url


class _InputImage(_Body):
    type: Literal["input_image"]
    image_url: str


_Part = Annotated[_Text | _ImageUrl | _InputImage, Field(discriminator="type")]


class _Function(_Body):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(_Body):
    function: _Function


class _Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None


class _Tool(_Body):
    type: Literal["function"]


class _Shared(_Body):
    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    top_logprobs: Literal[0] | None = None
    generation_config: None = None
    # Other names could change what the processor does with pictures.
    chat_template_kwargs: dict[Literal["enable_thinking", "thinking"], bool] | None = None


class _StreamOptions(_Body):
    include_usage: bool | None = None


class _PlainFormat(_Body):
    type: Literal["text"]


class _Chat(_Shared):
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream_options: _StreamOptions | None = None
    # transformers makes 1 + frequency_penalty its repetition penalty, which must be positive.
    frequency_penalty: float | None = Field(None, gt=-1, le=2)
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    logprobs: Literal[False] | None = None
    response_format: _PlainFormat | None = None
    modalities: list[Literal["text"]] | None = None


CHAT_FIELDS = frozenset(_Chat.model_fields)
"""Fields of a chat completion that are checked: they have their effect, or a value that asks for none."""


class _Item(_Body):
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[_Part] | None = None


class _TextFormat(_Body):
    format: _PlainFormat | None = None


class _Response(_Shared):
    input: str | list[_Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: None = None
    background: Literal[False] | None = None
    text: _TextFormat | None = None


def check_chat(body: Mapping[str, Any]) -> None:
    """Check the body of a chat completion.

    Raises:
        RequestError: a field is missing, has a bad value, or is not supported.
    """
    _check(_Chat, body)


def check_response(body: Mapping[str, Any]) -> None:
    """Check the body of a request for a response; raises as ``check_chat`` does."""
    _check(_Response, body)
    items = body["input"]
    if isinstance(items, list) and not items:
        raise bad_request("input is empty", "input")


def _check(kind: type[BaseModel], body: Mapping[str, Any]) -> None:
    try:
        kind.model_validate(body)
    except ValidationError as failure:
        raise _described(failure, body) from None


def _described(failure: ValidationError, body: Mapping[str, Any]) -> RequestError:
    """The error that says most: of alternatives, the one that lies deepest in the body."""
    error = max(failure.errors(include_url=False), key=lambda found: len(found["loc"]))
    path = _path(error["loc"], body, is_missing=error["type"] == "missing")
    shown = ""
    if error["type"] != "missing" and isinstance(error["input"], str | int | float | bool | None):
        shown = f"={error['input']!r:.60}"
    param = path.partition("[")[0].partition(".")[0]
    return bad_request(f"{path}{shown} is not valid: {error['msg'].lower()}", param)


def _path(location: Sequence[int | str], body: Any, *, is_missing: bool) -> str:
    """The place of an error in the body; pydantic's also names the alternatives that it tried."""
    path, value = "", body
    for index, entry in enumerate(location):
        if isinstance(entry, int) and isinstance(value, list):
            path, value = f"{path}[{entry}]", value[entry]
        elif isinstance(value, Mapping) and entry in value:
            path, value = f"{path}.{entry}", value[entry]
        elif is_missing and index == len(location) - 1:
            path = f"{path}.{entry}"
    return path.lstrip(".")
