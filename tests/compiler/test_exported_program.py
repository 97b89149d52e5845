"""Exported programs with reuse, against the model that was exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import vlcache_fx
from vlcache_fx.compiler.exported_program import CompiledProgram
from vlcache_fx.errors import OptionError, Reason, UnsupportedGraphError
from vlcache_fx.testing.tiny_vlm import TinyVlm, tiny_vlm, tiny_vlm_inputs

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def exported(model: TinyVlm) -> ExportedProgram:
    """One program for prompts and images of any length."""
    tokens, patches = Dim("tokens", min=4, max=512), Dim("patches", min=2, max=256)
    return export(
        model,
        (),
        tiny_vlm_inputs(5, 4, [(20, 0)]),
        dynamic_shapes={"input_ids": {1: tokens}, "pixel_values": {0: patches}},
    )


def compiled(model: TinyVlm, **options: Any) -> CompiledProgram:
    return vlcache_fx.compile_exported(exported(model), **{"lowering": "eager", "strict": True, **options})


def check(program: CompiledProgram, model: nn.Module, call: dict[str, Any], mode: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(program(**call), model(**call), **TOLERANCE)
    assert program.vlcache.last_report is not None
    assert program.vlcache.last_report["mode"] == mode


@pytest.mark.parametrize(
    ("options", "lowering"),
    [
        ({}, "eager"),
        ({"explicit_mask": True}, "eager"),
        ({"attention": "math", "softcap": 5.0}, "eager"),
        pytest.param({}, "inductor", marks=pytest.mark.thorough),
    ],
    ids=["causal", "mask", "written_out", "inductor"],
)
def test_dynamic_export_cold_and_warm(options: dict[str, Any], lowering: str) -> None:
    model = tiny_vlm(num_layers=3, **options)
    program = compiled(model, policy="full", lowering=lowering)
    check(program, model, tiny_vlm_inputs(5, 4, [(20, 0)]), "cold")
    check(program, model, tiny_vlm_inputs(17, 3, [(20, 0)], text_seed=1), "warm")
    check(program, model, tiny_vlm_inputs(9, 5, [(24, 1), (20, 0)]), "warm")
    check(program, model, tiny_vlm_inputs(2, 7, [(24, 1)]), "cold")
    check(program, model, tiny_vlm_inputs(40, 7, [(24, 1)]), "warm")


def test_reuse_computes_few_rows() -> None:
    program = compiled(tiny_vlm(), policy="first_k", budget=0.1)
    with torch.no_grad():
        program(**tiny_vlm_inputs(5, 4, [(20, 0)]))
        program(**tiny_vlm_inputs(9, 3, [(20, 0)]))
    report = program.vlcache.last_report
    assert report is not None
    assert report["mode"] == "warm"
    assert report["token_layer_fraction"] == pytest.approx(0.1)
    assert report["encoder_hit"] is True


class Language(nn.Module):
    """The decoder alone: media spans are marked in its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = tiny_vlm().decoder

    def forward(self, embeds: Tensor, scale: float | None = None) -> dict[str, Tensor]:
        logits: Tensor = self.decoder(embeds)
        return {"logits": logits if scale is None else logits * scale}


def language() -> tuple[Language, CompiledProgram]:
    model = Language().eval()
    program = export(
        model,
        (torch.randn(1, 9, 16),),
        {"scale": 2.0},
        dynamic_shapes=({1: Dim("tokens", min=2, max=256)}, None),
    )
    return model, vlcache_fx.compile_exported(program, policy="full", lowering="eager", strict=True)


def prompt(before: int, image: Tensor, after: int) -> Tensor:
    text = torch.randn(1, before + after, 16)
    embeds = torch.cat([text[:, :before], image[None], text[:, before:]], dim=1)
    return vlcache_fx.mark_spans(embeds, [(0, before, len(image))])


def test_language_model_with_marked_spans() -> None:
    model, program = language()
    image = torch.randn(18, 16)
    for before, mode in ((3, "cold"), (11, "warm")):
        embeds = prompt(before, image, 4)
        with torch.no_grad():
            got, want = program(embeds, scale=2.0), model(embeds, scale=2.0)
        assert got.keys() == want.keys()
        torch.testing.assert_close(got["logits"], want["logits"], **TOLERANCE)
        assert program.vlcache.last_report is not None
        assert program.vlcache.last_report["mode"] == mode


def test_without_marks_runs_unmodified() -> None:
    model, program = language()
    embeds = torch.randn(1, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(program(embeds, scale=2.0), model(embeds, scale=2.0), **TOLERANCE)
    assert program.vlcache.last_report is not None
    assert program.vlcache.last_report["reason"] == "no span is marked"


@pytest.mark.parametrize(
    "call",
    [
        ((torch.zeros(2, 9, 16),), {"scale": 2.0}),
        ((torch.zeros(1, 9, 16),), {"scale": 3.0}),
        ((torch.zeros(1, 9, 16),), {}),
        ((torch.zeros(1, 9, 16, dtype=torch.float64),), {"scale": 2.0}),
        ((torch.zeros(1, 400, 16),), {"scale": 2.0}),
        ((torch.zeros(9, 16),), {"scale": 2.0}),
        ((None,), {"scale": 2.0}),
    ],
    ids=["batch", "constant", "missing", "dtype", "too_long", "rank", "none"],
)
def test_calls_outside_specialization(call: Any) -> None:
    _, program = language()
    plain = program._arguments.module
    outcomes = []
    for run in (plain, program):
        try:
            outcomes.append(("returned", run(*call[0], **call[1])["logits"].shape))
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            outcomes.append((type(error).__name__, str(error)))
    assert outcomes[0] == outcomes[1]
    assert program.vlcache.last_report is None


def test_gradients_run_unmodified() -> None:
    model = tiny_vlm()
    program = compiled(model)
    call = tiny_vlm_inputs(5, 4, [(20, 0)])
    loss = program(**call).sum()
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert program.vlcache.last_report is not None
    assert "grad_required" in str(program.vlcache.last_report["reason"])


class WithCache(nn.Module):
    """A decoder layer whose keys and values are written into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm(num_layers=1)
        self.register_buffer("keys", torch.zeros(1, 64, 16))

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.vlm(input_ids, pixel_values)
        self.keys[:, : input_ids.shape[1]] = self.vlm.embed(input_ids)
        return logits


def test_applies_buffer_mutations() -> None:
    model = WithCache().eval()
    tokens, patches = Dim("tokens", min=4, max=64), Dim("patches", min=2, max=40)
    call = tiny_vlm_inputs(5, 4, [(20, 0)])
    program = export(model, (), call, dynamic_shapes={"input_ids": {1: tokens}, "pixel_values": {0: patches}})
    with_reuse = vlcache_fx.compile_exported(program, policy="full", lowering="eager", strict=True)
    for inputs, mode in ((call, "cold"), (tiny_vlm_inputs(15, 4, [(20, 0)]), "warm")):
        program.state_dict["keys"].zero_()
        with torch.no_grad():
            got = with_reuse(**inputs)
            written = program.state_dict["keys"].clone()
            model.keys.zero_()
            torch.testing.assert_close(got, model(**inputs), **TOLERANCE)
        torch.testing.assert_close(written, model.keys)
        assert written.any()
        assert with_reuse.vlcache.last_report is not None
        assert with_reuse.vlcache.last_report["mode"] == mode


class LearnedPositions(nn.Module):
    """Positions are part of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = tiny_vlm(learned_positions=True)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.vlm(input_ids, pixel_values)
        return logits


def test_refusals(caplog: pytest.LogCaptureFixture) -> None:
    call = tiny_vlm_inputs(5, 4, [(20, 0)])
    model = LearnedPositions().eval()
    program = export(model, (), call)
    with pytest.raises(UnsupportedGraphError) as refusal:
        vlcache_fx.compile_exported(program, strict=True)
    assert refusal.value.reason is Reason.POSITION_IN_STREAM
    degraded = vlcache_fx.compile_exported(program)
    assert "position_in_stream" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(degraded(**call), model(**call), **TOLERANCE)
    assert degraded.vlcache.last_report is not None
    assert degraded.vlcache.last_report["mode"] == "bypass"
    with pytest.raises(OptionError, match="budgte"):
        vlcache_fx.compile_exported(program, budgte=0.1)
