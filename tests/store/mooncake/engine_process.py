# ruff: noqa: T201 - the test reads what it prints
"""A process with an engine: answers about pictures, and prints the reports as JSON.

Arguments: the URL of a store, and the numbers of the questions, which are all about the same picture.
"""

from __future__ import annotations

import json
import sys

import torch

import vlcache_fx
from vlcache_fx.backend import engine_for
from vlcache_fx.store import open_store
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs


def main() -> None:
    url, *questions = sys.argv[1:]
    model, reference = tiny_vlm(), tiny_vlm()
    store = open_store(url, 1 << 26)
    options = {"lowering": "eager", "policy": "full", "store": store}
    model.forward = torch.compile(model.forward, backend="vlcache", options=options, dynamic=True)
    engine = engine_for(options)
    for question in questions:
        inputs = tiny_vlm_inputs(7 + int(question), 5, [(20, 0)], text_seed=int(question))
        with torch.no_grad():
            distance = float((model(**inputs) - reference(**inputs)).abs().max())
        report = engine.last_report
        assert report is not None
        tiers = [span["donor_tier"] for span in report["spans"]]
        print(json.dumps({"mode": report["mode"], "tiers": tiers, "distance": distance}), flush=True)
        if question != questions[-1]:
            sys.stdin.readline()
    print(json.dumps(engine.stats()["calls"]), flush=True)
    store.flush(60)
    store.close()
    assert vlcache_fx.__version__


if __name__ == "__main__":
    main()
