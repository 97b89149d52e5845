from pathlib import Path

import numpy as np
import pytest
import torch

from examples.vs_vllm.cases import Script
from examples.vs_vllm.checkpoint import TINY, write_checkpoint
from examples.vs_vllm.local import LocalPeer, VlcachePeer
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.runtime.report import Report, SpanReport

VISION_TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers")
    write_checkpoint(TINY, VISION_TOKENS, path / "checkpoint")
    return path


@pytest.fixture
def script(folder: Path) -> Script:
    return Script(VISION_TOKENS, TINY.vocabulary, 1, folder / "photos")


def test_local_peer_computes_everything(folder: Path, script: Script) -> None:
    peer = LocalPeer(folder / "checkpoint")
    request = script.round(0).cases["first"]
    with torch.no_grad():
        for _ in range(2):
            answer = peer.ask(request)
            assert answer.computed_tokens == answer.num_tokens == request.num_tokens
            assert answer.encoder_runs == 1
            assert 0 < answer.model_seconds < answer.seconds
        logprobs = peer.logprobs(request)
    assert logprobs.shape == (TINY.vocabulary,)
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-4)
    assert not peer.keeps
    peer.close()


PHOTO = SpanReport(4, 80, "key", hit=True)


@pytest.mark.parametrize(
    ("report", "described"),
    [
        (Report("cold", None, 100, rows_per_layer=(100, 100, 1)), (100, "exact")),
        (
            Report("warm", None, 100, (PHOTO,), rows_per_layer=(12, 12, 1), token_layer_fraction=0.0203),
            (12, "approximate, 2.0 % of the photo recomputed"),
        ),
        (
            Report(
                "warm",
                None,
                100,
                (PHOTO,),
                rows_per_layer=(2, 2, 2),
                prefix_tokens=90,
                token_layer_fraction=0.0,
            ),
            (2, "exact"),
        ),
        (Report("bypass", "batched"), (100, "exact, bypass: batched")),
    ],
)
def test_vlcache_peer_answer_from_report(
    folder: Path, report: Report, described: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = VlcachePeer(folder / "checkpoint", lowering="eager")  # it compiles at its first call: never
    monkeypatch.setattr(Engine, "last_report", report.as_dict())
    assert peer.keeps
    assert peer._describe(100) == described
    peer.close()
