"""Start ``vlcache serve``, and ask it about one picture behind two system prompts.

    pip install 'vlcache_fx[serve]' && python examples/ask_the_server.py

``--record FILE.svg`` keeps what the terminal shows as a picture. ``--at URL`` asks a server that runs
already, with the key in ``OPENAI_API_KEY``.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.text import Text

from vlcache_fx.serve.media import data_url
from vlcache_fx.testing import reference_vlm

SYSTEM_PROMPTS = (
    "you are a helpful assistant .",
    "look at the picture with care , then answer .",
    "answer with one word .",
)
WIDTH = 110


@dataclass(frozen=True)
class Answer:
    """One answer: its text, tokens of the prompt, those reused, and milliseconds until the first token."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    first_token_ms: float


@contextmanager
def served(console: Console, *options: str) -> Iterator[str]:
    """Run the server in the body; yield its URL when it is ready."""
    arguments = ["serve", "reference", "--port", "0", *options]
    console.print(f"[bold]$ vlcache {' '.join(arguments)}[/bold]")
    program = [sys.executable, "-c", "from vlcache_fx.cli import app; app()", *arguments]
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        program, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=dict(os.environ, COLUMNS=str(WIDTH))
    )
    assert server.stdout is not None
    try:
        url = ""
        for line in server.stdout:
            if not line.startswith("vlcache: ") and "it/s]" not in line:
                console.print(Text(line.rstrip()))
            if found := re.search(r"serving reference at (\S+)", line):
                url = found[1]
                break
        if not url:
            raise SystemExit("the server ended; its output is above")
        yield url
    finally:
        server.terminate()
        server.communicate(timeout=60)


def ask(client: OpenAI, question: reference_vlm.Question) -> Answer:
    """Ask about the question's picture."""
    pictures: Any = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images
    ]
    raw = client.chat.completions.with_raw_response.create(
        model="reference",
        messages=[
            {"role": "system", "content": question.system_prompt},
            {"role": "user", "content": [*pictures, {"type": "text", "text": question.text}]},
        ],
        max_tokens=4,
    )
    timing = dict(re.findall(r"(\w+);dur=([\d.]+)", raw.headers["server-timing"]))
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return Answer(
        str(answer.choices[0].message.content),
        answer.usage.prompt_tokens,
        answer.usage.prompt_tokens_details.cached_tokens or 0,
        sum(float(timing[step]) for step in ("prepare", "queue", "prefill")),
    )


def main(*options: str, record: Path | None = None, at: str | None = None) -> list[Answer]:
    """Start a server, ask, and return the answers.

    Args:
        *options: further options of ``vlcache serve``.
        record: file for a picture of the terminal.
        at: address of a server that runs, which ends with ``/v1``; None starts one.

    Raises:
        SystemExit: the server does not start.
    """
    console = Console(record=record is not None, width=WIDTH, highlight=False)
    (question,) = reference_vlm.make_questions(count=1)
    answers = []
    server = served(console, *options) if at is None else nullcontext(at)
    with server as url, OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "unused")) as client:
        for prompt in SYSTEM_PROMPTS:
            found = ask(client, replace(question, system_prompt=prompt))
            answers.append(found)
            console.print(
                f"\n[bold]system[/bold]  {prompt}\n[bold]user[/bold]    a picture, and: {question.text}"
            )
            console.print(f"[bold]answer[/bold]  {found.text}")
            console.print(
                f"[green]reused {found.cached_tokens} of {found.prompt_tokens} tokens; "
                f"first token after {found.first_token_ms:.0f} ms[/green]"
            )
    if record is not None:
        console.save_svg(str(record), title="vlcache serve")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="SVG file")
    parser.add_argument("--at", help="address of a server that runs, such as http://127.0.0.1:8000/v1")
    given, more = parser.parse_known_args()
    main(*more, record=given.record, at=given.at)
