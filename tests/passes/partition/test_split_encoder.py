"""``split_encoder`` and ``split_results``: the encoder is split from the rest of a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.analysis import analyze
from vlcache_fx.ir import InputKind
from vlcache_fx.passes.partition.split_encoder import split_encoder, split_results
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..programs import PROMPT, small, text


def test_graph(golden: Callable[[str, str], None]) -> None:
    captured, _, _ = small(rope="none")
    before = str(captured.graph_module.graph)
    split = split_encoder(captured, analyze(captured).encoder)
    assert split is not None
    assert str(captured.graph_module.graph) == before
    whole, encoder = text(captured.graph_module.graph), text(split.encoder.graph)
    golden(
        "split_encoder",
        f"before\n{whole}\n\nencoder\n{encoder}\n\ndecoder\n{text(split.decoder.graph_module.graph)}",
    )


def test_numbers() -> None:
    captured, graph, want = small()
    split = split_encoder(captured, analyze(captured).encoder)
    assert split is not None
    assert split.computes
    args = graph.calls[0]
    with torch.no_grad():
        features = split.encoder(*args)
        assert torch.equal(split.decoder.graph_module(*args, *features)[0], want)
        # The encoder depends on ``inputs`` and ``weights`` only, and the decoder not on pixels.
        other = [arg if index in (*split.inputs, *split.weights) else None for index, arg in enumerate(args)]
        assert torch.equal(split.encoder(*other)[0], features[0])
        args = [arg if index not in split.inputs else None for index, arg in enumerate(args)]
        assert torch.equal(split.decoder.graph_module(*args, *features)[0], want)
    assert [captured.kinds[index] for index in split.inputs] == [InputKind.DATA]
    assert {captured.kinds[index] for index in split.weights} == {InputKind.WEIGHT}
    assert split.decoder.kinds == (*captured.kinds, InputKind.DATA)


def test_split_encoder_decoder_analyses() -> None:
    captured, _, _ = small()
    split = split_encoder(captured, analyze(captured).encoder)
    assert split is not None
    facts = analyze(split.decoder)
    assert facts.merges[0].features.op == "placeholder"
    assert facts.encoder == ()
    assert split_encoder(split.decoder, facts.encoder) is None


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("options", [{}, {"explicit_mask": True}, {"last_only": True}])
def test_split_encoder_facts_of_decoder(options: dict[str, bool], dynamic: bool | None) -> None:
    captured, _ = captured_graph(tiny_vlm(num_layers=2, **options), PROMPT, dynamic=dynamic)
    facts = analyze(captured)
    split = split_encoder(captured, facts.encoder)
    assert split is not None
    assert facts.without_encoder(split.nodes) == analyze(split.decoder)


def test_split_encoder_features_as_inputs() -> None:
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    call = {"input_ids": PROMPT["input_ids"], "features": features}
    captured, _ = captured_graph(tiny_vlm(num_layers=1), call)
    before = str(captured.graph_module.graph)
    assert split_encoder(captured, analyze(captured).encoder) is None
    assert str(captured.graph_module.graph) == before


def test_split_encoder_conversions_only() -> None:
    model = tiny_vlm(num_layers=1)

    class Outside(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vlm = model

        def forward(self, input_ids: torch.Tensor, halves: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return self.vlm(input_ids, features=torch.cat(halves).float())

    ids = tiny_vlm_inputs(3, 2, [(5, 0)])["input_ids"]
    call = {
        "input_ids": ids,
        "halves": (torch.ones(2, 16, dtype=torch.float64), torch.ones(3, 16, dtype=torch.float64)),
    }
    captured, _ = captured_graph(Outside(), call)
    split = split_encoder(captured, analyze(captured).encoder)
    assert split is not None
    assert not split.computes


class TextBesidePixels(torch.nn.Module):
    """A tower over pixels, and token embeddings that do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.project = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.project(pixels)[:, None]
        return self.embed(ids), torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0]


def test_split_results() -> None:
    call = {"ids": torch.tensor([[1, 2, 3]]), "pixels": torch.randn(1, 5, 4)}
    captured, graph = captured_graph(TextBesidePixels(), call)
    args = graph.calls[0]
    split = split_results(captured)
    with torch.no_grad():
        want = captured.graph_module(*args)
        assert (split.other_indices, split.encoder_indices) == ((0,), (1,))
        own = {*split.inputs, *split.weights}
        encoded = split.encoder(*[arg if index in own else None for index, arg in enumerate(args)])
        others = split.others(*[None if index in split.inputs else arg for index, arg in enumerate(args)])
    assert [args[index].shape for index in split.inputs] == [call["pixels"].shape]
    for got, wanted in zip(split.joined(encoded, others), want, strict=True):
        assert torch.equal(got, wanted)
