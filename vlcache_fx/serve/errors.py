"""Errors that a client sees, as the OpenAI API writes them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from vlcache_fx.errors import VlcacheError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CLIENT_GONE = 499
"""Status of requests whose client went away, as nginx counts them."""


class RequestError(VlcacheError):
    """A request that is not answered; the message is for the client, and names no paths.

    Args:
        status: HTTP status.
        message: what is wrong, and what is valid.
        code: a word for programs, such as ``context_length_exceeded``.
        param: the field that is wrong.
        retry_after_s: after how many seconds the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        # Strings of JSON may hold halves of characters, which cannot be sent back.
        self.message = message.encode("utf-8", "replace").decode()
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, fallback)
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """An error with status 400."""
    return RequestError(400, message, param=param, code=code)
