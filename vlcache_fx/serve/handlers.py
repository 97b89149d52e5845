"""The handlers of transformers' server, with checked requests, batches and the numbers of reuse."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from openai.types.chat import ChatCompletionChunk
from openai.types.completion_usage import PromptTokensDetails
from starlette.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.chat_completion import UNUSED_CHAT_COMPLETION_FIELDS, ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from vlcache_fx.serve.bodies import CHAT_FIELDS, check_chat, check_response
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.exchange import current_exchange
from vlcache_fx.serve.lengths import answer_length, check_prompt, context_length
from vlcache_fx.serve.media import MediaLoader
from vlcache_fx.serve.models import ServedModels
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.pictures import digests_of
from vlcache_fx.serve.prompt import build_inputs
from vlcache_fx.serve.request import FIELD, read_settings, tenant_of
from vlcache_fx.serve.row import PARSING_FAILED
from vlcache_fx.serve.sampling import checked_bias, set_sampling
from vlcache_fx.serve.state import RequestManager, ServeState
from vlcache_fx.serve.stop_strings import cut_at_stop
from vlcache_fx.serve.versions import taken

log = logging.getLogger("vlcache_fx.serve")

LENGTHS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""The newest name first. Older versions of transformers ignore ``max_completion_tokens``."""
DONE = "data: [DONE]\n\n"
WITHOUT_TEMPLATE: Any = SimpleNamespace(config=SimpleNamespace(model_type=""), response_template=None)
"""Stands for a model and its processor where transformers asks them how answers are parsed: not at all."""


class _Served(BaseHandler):
    """What both handlers share. Each request has a copy of its handler, which knows the request's job."""

    model_manager: ServedModels
    generation_state: ServeState
    _manager: RequestManager
    _body: Mapping[str, Any]

    def __init__(self, models: ServedModels, state: ServeState, options: ServeOptions) -> None:
        super().__init__(models, state)
        self._options, self._media = options, MediaLoader(options)

    def _check(self, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        raise NotImplementedError

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request.

        Raises:
            RequestError: it is refused, or the model failed.
        """
        exchange, options = current_exchange(), self._options
        body = {name: value for name, value in body.items() if value is not None}
        tenant = tenant_of(exchange.api_key) if options.salt_from_api_key else ""
        settings = read_settings(body.pop(FIELD, None), tenant=tenant, server_salt=options.key_salt)
        self._check(body)
        self._validate_request(body)
        self.model_manager.check_name(body["model"])
        model_id, model, processor = self._resolve_model(body)
        modality = self.model_manager.get_model_modality(model, processor)
        tools = (
            None if body.get("tool_choice") == "none" else ResponseHandler._normalize_tools(body.get("tools"))
        )

        def prepare() -> tuple[Any, tuple[str, ...]]:
            values = body.get("chat_template_kwargs")
            inputs = build_inputs(
                self._messages(body), processor, modality, self._media, tools=tools, template_values=values
            )
            return inputs.to(model.device), digests_of(body, settings.salt or "")

        batcher = self.generation_state.batcher(model_id, model)
        batcher.check_room()  # before the work on pictures
        # Pictures are decoded in other threads, so that answers go on meanwhile.
        inputs, pictures = await asyncio.to_thread(prepare)
        config = self._config_for(body, model, inputs["input_ids"].shape[-1])
        stops = (body["stop"],) if isinstance(body.get("stop"), str) else tuple(body.get("stop") or ())
        one = copy.copy(self)
        one._body = body
        one._manager = RequestManager(batcher, settings, exchange, stops, body.get("seed"), pictures)
        given = {"model": model, "processor": processor, "model_id": model_id, "inputs": inputs}
        exchange.timings_ms["prepare"] = 1e3 * (time.perf_counter() - exchange.arrived_s)
        response = await one._answer(
            bool(body.get("stream")),
            request_id=request_id,
            gen_config=config,
            gen_manager=one._manager,
            tools=tools,
            **given,
        )
        if one._manager.job is not None:
            exchange.timings_ms.update(one._manager.job.timings_ms())
            exchange.donor_keys = one._manager.job.donor_keys
        return response

    async def _answer(self, is_stream: bool, **given: Any) -> Any:
        """Generate; a stream begins with its first token, so that a failure before has a status."""
        if not is_stream:
            return self._described(await self._whole(**given))
        stream = self._streaming(**taken(self._streaming, given))  # type: ignore[attr-defined]
        job = self._manager.job
        assert job is not None  # submitted by _streaming
        await job.began
        return _edited(stream, lambda text: self._edit(text, given["request_id"]))

    async def _whole(self, **given: Any) -> Any:
        """The whole answer; as text, where the model calls a tool in a form that cannot be read."""
        try:
            return await self._non_streaming(**taken(self._non_streaming, given))  # type: ignore[attr-defined]
        except PARSING_FAILED:
            if self._manager.answer is None:
                raise
            log.warning("a model's answer cannot be parsed", exc_info=True)
            plain = {"model": WITHOUT_TEMPLATE, "processor": WITHOUT_TEMPLATE}
            return await self._non_streaming(**taken(self._non_streaming, given | plain))  # type: ignore[attr-defined]

    def _described(self, response: JSONResponse) -> JSONResponse:
        return response

    def _edit(self, text: str, request_id: str) -> str:
        """Change the events of a stream; transformers writes errors as text."""
        start = text.find('data: {"error": "')
        if start < 0:
            return text
        failed = RequestError(500, f"the answer is not complete; request {request_id}", code="model_failed")
        return f"{text[:start]}data: {json.dumps(failed.body())}\n\n"

    def _config_for(self, body: dict[str, Any], model: Any, prompt_tokens: int) -> Any:
        """How to generate.

        Raises:
            RequestError: the prompt or the answer is too long, or ``logit_bias`` names no tokens.
        """
        context = context_length(model)
        check_prompt(prompt_tokens, self._options, context)
        # The base class would seed all threads, and stop strings are found in the text.
        given = {name: value for name, value in body.items() if name not in ("seed", "stop")}
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        given["logit_bias"] = checked_bias(body.get("logit_bias", {}), vocabulary)
        config = self._build_generation_config(given, model.generation_config)
        wanted = next((body[name] for name in LENGTHS if name in body), None)
        config.max_new_tokens = answer_length(wanted, prompt_tokens, self._options, context)
        set_sampling(config, body.get("temperature"))
        return config

    @property
    def _cached_tokens(self) -> int:
        job = self._manager.job
        return 0 if job is None else job.cached_tokens


class ServedChat(_Served, ChatCompletionHandler):
    """``/v1/chat/completions``."""

    _unused_fields = UNUSED_CHAT_COMPLETION_FIELDS - CHAT_FIELDS

    def _check(self, body: dict[str, Any]) -> None:
        check_chat(body)

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return list(body["messages"])

    def _finish_reason(self, found: str | None) -> str | None:
        job = self._manager.job
        return job.row.finish_reason if job is not None and found in ("stop", "length") else found

    def _build_completion(self, *args: Any, **given: Any) -> dict[str, Any]:
        request_id, content, model_id = args
        given["finish_reason"] = self._finish_reason(given["finish_reason"])
        given["usage"].prompt_tokens_details = PromptTokensDetails(cached_tokens=self._cached_tokens)
        content = cut_at_stop(content, self._manager.stops)
        return super()._build_completion(request_id, content, model_id, **given)

    def _build_chunk_sse(self, *args: Any, **given: Any) -> str:
        """As transformers does; usage is a chunk of its own, if the client wants it, as OpenAI sends it."""
        usage = given.pop("usage", None)
        given["finish_reason"] = self._finish_reason(given.get("finish_reason"))
        text = super()._build_chunk_sse(*args, **given)
        if usage is None:
            return text
        if (self._body.get("stream_options") or {}).get("include_usage"):
            usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=self._cached_tokens)
            chunk = ChatCompletionChunk.model_validate_json(text.removeprefix("data: "))
            text += self.chunk_to_sse(chunk.model_copy(update={"choices": [], "usage": usage}))
        return text + DONE


class ServedResponse(_Served, ResponseHandler):
    """``/v1/responses``."""

    def _check(self, body: dict[str, Any]) -> None:
        check_response(body)

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return self._normalize_input(body)

    async def _answer(self, is_stream: bool, **given: Any) -> Any:
        return await super()._answer(is_stream, body=self._body, **given)

    def _described(self, response: JSONResponse) -> JSONResponse:
        found = json.loads(bytes(response.body))
        self._complete(found)
        return JSONResponse(found)

    def _edit(self, text: str, request_id: str) -> str:  # noqa: ARG002
        if '"type":"response.completed"' not in text:
            return text
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]
        for event in events:
            if event["type"] == "response.completed":
                self._complete(event["response"])
                event["type"] = f"response.{event['response']['status']}"
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events)

    def _complete(self, response: dict[str, Any]) -> None:
        """Write how many tokens were reused, and whether the answer is whole."""
        response["usage"]["input_tokens_details"]["cached_tokens"] = self._cached_tokens
        job = self._manager.job
        if job is not None and job.row.finish_reason == "length":
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens"}


def _edited(response: StreamingResponse, edit: Callable[[str], str]) -> StreamingResponse:
    """The stream with each of its parts changed."""
    parts = response.body_iterator

    async def edited() -> AsyncIterator[str]:
        async for part in parts:
            yield edit(part if isinstance(part, str) else bytes(part).decode())

    response.body_iterator = edited()
    return response
