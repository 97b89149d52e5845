"""A server in a thread, and questions for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from vlcache_fx.serve.media import data_url
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.server import Server
from vlcache_fx.testing.reference_vlm import Question

READY_S = 900


class Running:
    """A server that runs in a thread.

    Attributes:
        server: the server.
        first_answers: status of ``/health`` and of a chat, before the models were loaded.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.server = Server(options)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.first_answers: dict[str, httpx2.Response] = {}

    @property
    def url(self) -> str:
        return self.server.url

    def _run(self) -> None:
        try:
            self.server.run()
        except Exception as error:  # noqa: BLE001 - the test reports it
            self.failure = error

    def wait_until_ready(self) -> None:
        headers = {"Authorization": f"Bearer {''.join(self.server.service.options.api_keys[:1])}"}
        for name, path in (("health", "/health"), ("live", "/live")):
            self.first_answers[name] = httpx2.get(self.url + path)
        body = {"model": "reference", "messages": [{"role": "user", "content": "hello"}]}
        self.first_answers["chat"] = httpx2.post(
            f"{self.url}/v1/chat/completions", json=body, headers=headers
        )
        deadline = time.monotonic() + READY_S
        while httpx2.get(f"{self.url}/health").status_code != 200:
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline, "the server is not ready"
            time.sleep(0.2)


@contextmanager
def running(options: ServeOptions) -> Iterator[Running]:
    """Run a server until the end of the body."""
    found = Running(options)
    found.thread.start()
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.server.stop()
        found.thread.join(60)
        assert not found.thread.is_alive()


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The question as messages of a chat."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls_of(question)]
    text = [{"type": "text", "text": question.text}]
    content = text + pictures if question.question_first else pictures + text
    return [{"role": "system", "content": question.system_prompt}, {"role": "user", "content": content}]


def urls_of(question: Question) -> list[str]:
    """The pictures of a question as data URLs."""
    return [data_url(image) for image in question.images]
