"""The messages of a request -> inputs of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.cli.serving.utils import BaseHandler, Modality

from vlcache_fx.serve.errors import RequestError, bad_request
from vlcache_fx.serve.media import MediaLoader

log = logging.getLogger("vlcache_fx.serve")

PLACEHOLDERS = ("image_token", "video_token", "audio_token")
"""Attributes of processors with the text that stands for media."""


def build_inputs(
    messages: Sequence[dict[str, Any]],
    processor: Any,
    modality: Modality,
    media: MediaLoader,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    template_values: Mapping[str, Any] | None = None,
) -> Any:
    """Load the pictures of messages and process them; return the inputs of a batch of one.

    Args:
        messages: as the chat completions of the OpenAI API have them.
        processor: the model's processor.
        modality: what the model takes.
        media: loads pictures.
        tools: the functions that the model may call.
        template_values: variables of the chat template.

    Raises:
        RequestError: a picture is refused, or the processor does not take the request.
    """
    try:
        has_pictures = any(_is_picture(part) for message in messages for part in _parts(message))
        if has_pictures and modality is Modality.LLM:
            raise bad_request("this model takes no pictures", "messages")
        _refuse_placeholders(messages, processor)
        parsed = BaseHandler.get_processor_inputs_from_messages([_known(each) for each in messages], modality)
        if modality is not Modality.LLM:
            media.load_all(parsed)
        return processor.apply_chat_template(
            parsed,
            add_generation_prompt=True,
            tools=tools or None,
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
            **(template_values or {}),
        )
    except RequestError:
        raise
    except Exception as error:
        # What a processor refuses is the request's content: the sides of a picture, the order of roles.
        log.debug("a processor refused a request", exc_info=True)
        detail = f": {error}" if isinstance(error, ValueError) else ""
        raise bad_request(f"the model's processor does not take this request{detail}"[:300]) from None


def _known(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the role that chat templates know: ``developer`` is a newer name of ``system``."""
    message = {name: value for name, value in message.items() if value is not None}
    return message | {"role": "system"} if message["role"] == "developer" else message


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def _is_picture(part: Mapping[str, Any]) -> bool:
    return part["type"] in ("image_url", "input_image")


def _refuse_placeholders(messages: Sequence[Mapping[str, Any]], processor: Any) -> None:
    """Refuse text that a processor would take for a picture."""
    names = [getattr(processor, name, None) for name in PLACEHOLDERS]
    for message in messages:
        for part in _parts(message):
            for name in names:
                if isinstance(name, str) and name in part.get("text", ""):
                    raise bad_request(f"text must not contain {name!r}, which stands for media", "messages")
