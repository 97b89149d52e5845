"""Explanations name the kinds that the backend compiles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlcache_fx.compiler.explain import explain
from vlcache_fx.testing.tiny_hybrid import tiny_hybrid

from ..runtime.helpers import own_compiler_state
from ..runtime.test_merge import cut
from .graphs import PROMPT, Looking


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def test_explain_graphs_cut_after_the_merge() -> None:
    merge, decoder = explain(cut(), dict(PROMPT))
    assert (merge.kind, merge.reason) == ("merge", None)
    assert (decoder.kind, decoder.merges) == ("decoder", ())
    assert decoder.as_dict()["num_layers"] == decoder.num_layers > 0


def test_explain_recurrent_layers() -> None:
    (found,) = explain(tiny_hybrid("dcap"), dict(PROMPT))
    assert (found.kind, found.reason) == ("decoder", None)
    assert found.attention == ("recurrent", "convolution", "causal", "causal")
    assert (len(found.key_frontiers), len(found.value_frontiers)) == (2, 2)


def test_explain_encoder() -> None:
    (found,) = explain(Looking(), {"pixels": torch.ones(1, 2, 5, 8)})
    assert (found.kind, found.reason) == ("encoder", None)


def test_explain_ignores_recompile_limit() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        assert all(len(explain(Looking(), {"pixels": torch.ones(1, 2, 5, 8)})) == 1 for _ in range(4))


def test_explain_decoding_step() -> None:
    pytest.importorskip("transformers")
    from vlcache_fx.testing.families import tiny_llava

    model = tiny_llava(2)
    with torch.no_grad():
        past = model(input_ids=torch.tensor([[5, 6, 7]])).past_key_values
    found = explain(model.forward, {"input_ids": torch.tensor([[8]]), "past_key_values": past})
    assert "decoding step" in [one.kind for one in found]
