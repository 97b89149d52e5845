"""Two workers share a Mooncake Store: what the first has computed of a picture, the second reuses.

Starts everything itself, on 127.0.0.1: a Mooncake master, a process that stores, and two workers, one after
the other. Each answers questions about one picture, after system prompts of its own. The second worker has
never seen the picture, and computes no prompt of it in full.

    pip install 'vlcache_fx[transformers,mooncake-cpu]' && python examples/shared_store.py

With several machines, start ``mooncake_master`` on one, ``mooncake_client`` on those that store, copy
``~/.config/vlcache/secret`` to all, and give every worker ``store="mooncake://HOST:PORT"``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.testing import reference_vlm
from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

PROMPTS = (
    ("you are a helpful assistant .", "look at the picture with care ."),
    ("answer with one word .", "be brief and exact ."),
)
"""System prompts of each worker's questions."""


@dataclass(frozen=True)
class Answer:
    """One answer: the worker, how it was computed, where the donor came from, and its time."""

    worker: int
    mode: str
    tier: str | None
    elapsed_ms: float
    text: str


def work(worker: int, url: str) -> None:
    """Be a worker: answer questions about the picture, and print the answers as JSON."""
    model = vlcache_fx.compile(
        reference_vlm.load_model(), store=url, lowering="eager", dynamic=True, strict=True
    )
    processor = reference_vlm.load_processor()
    question, *others = reference_vlm.make_questions(count=3)
    # Tracing takes seconds and is not the point here: it happens with a picture that the other has not.
    for prompt in PROMPTS[worker]:
        reference_vlm.answer_questions(model, processor, [replace(others[worker], system_prompt=prompt)])
    for prompt in PROMPTS[worker]:
        asked = replace(question, system_prompt=prompt)
        begin = time.perf_counter()
        (text,) = reference_vlm.answer_questions(model, processor, [asked])
        elapsed_ms = 1000 * (time.perf_counter() - begin)
        report = model.vlcache.last_report
        tier = report["spans"][0]["donor_tier"]
        print(json.dumps([worker, report["mode"], tier, elapsed_ms, text]), flush=True)
    model.vlcache.close()


def main() -> list[Answer]:
    """Start everything, print the table, and return the answers.

    Raises:
        SystemExit: Mooncake is not installed here.
    """
    if missing():
        raise SystemExit(f"this example {missing()}")
    answers = []
    with tempfile.TemporaryDirectory() as folder, MooncakeCluster(Path(folder)) as cluster:
        url = cluster.url(f"secret_file={folder}/secret&buffer=64MiB&timeout_ms=2000")
        for worker in range(len(PROMPTS)):
            command = [sys.executable, __file__, "--worker", str(worker), "--url", url]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            answers += [Answer(*json.loads(line)) for line in done.stdout.splitlines()]
    table = Table("worker", "mode", "donor from", "ms", "answer", title="questions about one picture")
    for answer in answers:
        row = (str(answer.worker), answer.mode, answer.tier or "-", f"{answer.elapsed_ms:.1f}", answer.text)
        table.add_row(*row)
    Console().print(table)
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worker", type=int, help="be this worker (used by the example itself)")
    parser.add_argument("--url", help="of the store, for a worker")
    arguments = parser.parse_args()
    if arguments.worker is None:
        main()
    else:
        work(arguments.worker, arguments.url)
