"""How long prompts and answers may be."""

from __future__ import annotations

from typing import Any

from vlcache_fx.serve.errors import bad_request
from vlcache_fx.serve.options import ServeOptions

TOO_LONG = "context_length_exceeded"
USUAL_ANSWER = 1024
"""Longest answer where a request names none."""


def context_length(model: Any) -> int | None:
    """The model's longest sequence in tokens; None where its configuration names none."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_prompt(num_tokens: int, options: ServeOptions, context: int | None) -> None:
    """Check the length of a prompt with its pictures: an answer of one token must fit too.

    Raises:
        RequestError: 400 ``context_length_exceeded``.
    """
    limits = [options.max_prompt_tokens, None if context is None else context - 1]
    longest = min((limit for limit in limits if limit is not None), default=num_tokens)
    if num_tokens > longest:
        raise bad_request(
            f"the prompt has {num_tokens} tokens with its pictures, and the longest is {longest}",
            "messages",
            TOO_LONG,
        )


def answer_length(wanted: int | None, prompt_tokens: int, options: ServeOptions, context: int | None) -> int:
    """The longest answer to a prompt, in tokens.

    Args:
        wanted: what the request asks for; None if it does not.
        prompt_tokens: length of the prompt.
        options: bounds.
        context: the model's longest sequence; None for any.

    Raises:
        RequestError: 400, the request asks for more than is possible.
    """
    limit = options.max_output_tokens
    room = limit if context is None else context - prompt_tokens
    if wanted is None:
        return min(USUAL_ANSWER, limit, room)
    if wanted > limit:
        raise bad_request(
            f"{wanted} tokens are too many for an answer: max_output_tokens is {limit}", "max_tokens"
        )
    if wanted > room:
        raise bad_request(
            f"{prompt_tokens} tokens of the prompt and {wanted} of the answer exceed the model's {context}",
            "max_tokens",
            TOO_LONG,
        )
    return wanted
