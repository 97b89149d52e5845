"""Sessions on ONNX Runtime against the unmodified models, and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import torch
from torch import Tensor

import vlcache_fx
from vlcache_fx.deploy.sessions import OnnxSession
from vlcache_fx.deploy.trace import trace
from vlcache_fx.errors import ExportError, OptionError, PlanError
from vlcache_fx.integrations.stages import generation_stages
from vlcache_fx.store import MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm_inputs

from .helpers import Exported, assert_close, named_results, report_of, tiny_shapes

FAMILIES = ["llava", "qwen"]
OPSETS = ["tiny", "tiny_profiled"]
"""Exports with decomposed attention, and with attention nodes."""

STEPS: list[tuple[list[int], str, bool | None]] = [
    ([0], "cold", False),
    ([0], "warm", True),
    ([1], "cold", False),
    ([1, 0], "warm", True),
    ([0, 1], "warm", True),
    ([], "bypass", None),
]
"""Images of consecutive prompts, each after another text: mode, and whether all encoder calls hit."""


def features_of(exported: Exported, session: OnnxSession, images: list[int]) -> dict[str, Tensor]:
    """Features of a prompt's images, from the session's encoders."""
    found, _ = session._features(exported.inputs(images))
    return found


def test_session_with_packed_donors(tiny: Exported) -> None:
    session = tiny.session(policy="full", donor_dtype="int8")
    for text, mode in enumerate(("cold", "warm")):
        assert_close(session.prefill(**tiny.given([0], text)), tiny.expected([0], text), tiny.atol)
        assert report_of(session)["mode"] == mode
    donor = session.vlcache.store.get(report_of(session)["spans"][0]["key"])
    assert donor is not None
    assert donor.tensors["0.k"].dtype == torch.int8
    with session.vlcache.using(policy="none"):
        found = session.prefill(**tiny.given([0], 2))
    assert report_of(session)["mode"] == "warm"
    for name, exact in tiny.expected([0], 2).items():
        assert float((found[name] - exact).abs().max()) < 0.5


@pytest.mark.parametrize("any_export", FAMILIES, indirect=True)
def test_prefill_equals_unmodified_model_at_any_shape(any_export: Exported) -> None:
    session = any_export.session(policy="full")
    for text, (images, mode, encoder_hit) in enumerate(STEPS):
        given = any_export.given(images, text)
        assert_close(session.prefill(**given), any_export.expected(images, text), any_export.atol)
        report = report_of(session)
        assert (report["mode"], report["encoder_hit"]) == (mode, encoder_hit)
        num_tokens = given["input_ids"].shape[1]
        assert report["num_tokens"] == num_tokens
        assert report["rows_per_layer"] == (*[num_tokens] * session.manifest.decoder.num_layers, 2)
        assert [span["hit"] for span in report["spans"]] == [mode == "warm"] * len(images)
    assert session.vlcache.stats()["calls"] == {"cold": 2, "warm": 3, "bypass": 1}


@pytest.mark.parametrize("any_export", OPSETS, indirect=True)
def test_prefill_of_plain_torch_model(any_export: Exported) -> None:
    session = any_export.session(policy="full")
    for text, images, mode in ((0, [0], "cold"), (1, [0], "warm"), (2, [1], "cold"), (9, [1], "warm")):
        given = any_export.given(images, text)
        assert_close(session.prefill(**given), any_export.expected(images, text))
        report = report_of(session)
        assert report["mode"] == mode
        assert report["encoder_hit"] is (mode == "warm")
        assert report["rows_per_layer"] == (*[given["input_ids"].shape[1]] * 3, 2)
    for text, images in ((3, [1, 0]), (4, [0, 1])):  # its encoder takes both images as one item
        assert_close(session.prefill(**any_export.given(images, text)), any_export.expected(images, text))
        assert report_of(session)["mode"] in ("cold", "warm")


def test_prefill_of_plain_torch_model_text_only(tiny: Exported) -> None:
    session, text = tiny.session(policy="full"), tiny.inputs([], 3)
    with torch.no_grad():
        expected = {"result.0": tiny.model(**text)}
    assert_close(session.prefill(**text), expected)
    assert report_of(session)["reason"] == "no media span"


@pytest.mark.parametrize("any_export", FAMILIES, indirect=True)
def test_generate_equals_unmodified_model(any_export: Exported) -> None:
    session = any_export.session(policy="full")
    for text, images, mode in ((0, [0], "cold"), (1, [0], "warm"), (2, [1, 0], "warm")):
        assert answer(any_export, session, images, text) == greedy(any_export, images, text)
        assert report_of(session)["mode"] == mode


@pytest.mark.parametrize("any_export", FAMILIES, indirect=True)
def test_generate_text_only(any_export: Exported) -> None:
    session = any_export.session()
    assert answer(any_export, session, [], 1) == greedy(any_export, [], 1)
    assert report_of(session)["reason"] == "no media span"


def answer(exported: Exported, session: OnnxSession, images: list[int], text: int) -> list[int]:
    end = exported.model.generation_config.eos_token_id
    tokens: list[int] = session.generate(6, end, **exported.given(images, text)).tolist()
    return tokens


def greedy(exported: Exported, images: list[int], text: int) -> list[int]:
    inputs = exported.inputs(images, text)
    whole = exported.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    tokens: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def test_generate_stops_at_eos(llava: Exported) -> None:
    session, given = llava.session(policy="full"), llava.given([0])
    whole = session.generate(6, **given).tolist()
    end = next(index for index in range(1, 6) if whole[index] not in whole[:index])
    assert session.generate(6, eos_token_id=whole[end], **given).tolist() == whole[: end + 1]
    assert session.generate(1, **given).tolist() == whole[:1]


def test_decode_continues_the_prefill(qwen: Exported) -> None:
    session, given = qwen.session(policy="full"), qwen.given([1, 0], 2)
    state = session.prefill(**given)
    token, place = state["logits"].argmax(-1), given["position_ids"][..., -1:] + 1
    step = session.decode(token, place, state)
    with torch.no_grad():
        before = qwen.model(**qwen.inputs([1, 0], 2), use_cache=True)
        result = qwen.model(
            input_ids=token, position_ids=place, past_key_values=before.past_key_values, logits_to_keep=1
        )
    layers = enumerate(result.past_key_values.layers)
    caches = {
        f"present.{i}.{name}": getattr(layer, f"{name}s") for i, layer in layers for name in ("key", "value")
    }
    assert_close(step, {"logits": result.logits, **caches})


def compiled_model(exported: Exported, **options: Any) -> Any:
    """Compile the model: a prompt's images and text -> results and report."""
    options = {"lowering": "eager", "strict": True, "min_span_tokens": 4, **options}
    if exported.kind == "tiny":
        program = torch.export.export(
            exported.model, (), exported.inputs([0]), dynamic_shapes=tiny_shapes(), strict=False
        )
        run = vlcache_fx.compile_exported(program, **options)
        names: tuple[str, ...] = ("result.0",)
    else:
        stages = generation_stages(exported.model, exported.inputs([0, 1]))
        assert stages is not None
        run, names = vlcache_fx.compile_exported(trace(stages.prefill), **options), stages.prefill.outputs

    def results(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with torch.no_grad():
            found = run(**given) if exported.kind == "tiny" else run(*given.values())
        report = run.vlcache.last_report
        assert report is not None
        return dict(zip(names, [found] if isinstance(found, Tensor) else found, strict=True)), report

    return results


DEFAULTS: dict[str, Any] = {}
FIRST_K = {"policy": "first_k", "budget": 0.2}


@pytest.mark.parametrize(
    ("any_export", "options"),
    [("qwen", DEFAULTS), ("tiny", DEFAULTS), ("tiny", FIRST_K)],
    indirect=["any_export"],
    ids=["qwen", "tiny", "tiny-first_k"],
)
def test_prefill_reuses_like_compiled_model(any_export: Exported, options: dict[str, Any]) -> None:
    session, torch_path = any_export.session(**options), compiled_model(any_export, **options)
    for text, mode in ((0, "cold"), (2, "warm"), (4, "warm")):
        given = any_export.given([0], text)
        same = given
        if any_export.kind != "tiny":  # its graph takes features
            same = {**given, **features_of(any_export, session, [0])}
            same = {name: same[name] for name in session.manifest.inputs}
        expected, plan = torch_path(same)
        assert_close(session.prefill(**given), expected)
        report = report_of(session)
        assert (report["mode"], plan["mode"]) == (mode, mode)
        for what in ("rows_per_layer", "token_layer_fraction", "explanations", "prefix_tokens"):
            assert report[what] == plan[what]
    assert report_of(session)["token_layer_fraction"] < 0.5


def test_prefill_default_budget_reuses_like_compiled_model(llava: Exported) -> None:
    session = llava.session()
    compiled = vlcache_fx.compile(copy.deepcopy(llava.model), lowering="eager", strict=True, dynamic=True)
    for text, images in ((0, [0]), (3, [0]), (1, [1, 0])):
        with torch.no_grad():
            expected = named_results("llava", compiled, llava.inputs(images, text))
        assert_close(session.prefill(**llava.given(images, text)), expected)
        report, other = report_of(session), compiled.vlcache.last_report
        for what in ("mode", "rows_per_layer", "token_layer_fraction", "encoder_hit"):
            assert report[what] == other[what]
    assert report["mode"] == "warm"


def test_prefill_within_budget_is_inexact(llava: Exported) -> None:
    session = llava.session()
    session.prefill(**llava.given([0]))
    got = session.prefill(**llava.given([0], 2))
    assert float((got["logits"] - llava.expected([0], 2)["logits"]).abs().max()) > 1e-3


def test_prefill_identical_prompt_is_exact(llava: Exported) -> None:
    session = llava.session()
    given = llava.given([0])
    first = session.prefill(**given)
    assert_close(session.prefill(**given), first)
    report = report_of(session)
    assert report["mode"] == "warm"
    assert report["prefix_tokens"] > 36
    assert sum(report["rows_per_layer"]) < 20


def test_session_defaults_of_policy_and_budget(tiny: Exported, tiny_blended: Exported) -> None:
    plain, blended = tiny.session(), tiny_blended.session()
    assert (plain.vlcache.options.policy, plain.vlcache.options.budget) == ("layer_aware", 0.02)
    assert (blended.vlcache.options.policy, blended.vlcache.options.budget) == ("cacheblend", 0.02)
    other = tiny_blended.session(policy="full", budget=0.5).vlcache.options
    assert (other.policy, other.budget) == ("full", 0.5)


def test_session_with_profile_computes_its_rows(tiny_profiled: Exported, tiny_profile: Path) -> None:
    manifest = tiny_profiled.manifest
    assert (manifest.decoder.layer_groups, manifest.budget) == ((1, 2), 0.3)
    assert manifest.profile_fingerprint == manifest.decoder.model_fingerprint
    options = {"profile": tiny_profile, "budget": 0.3}
    session, torch_path = tiny_profiled.session(**options), compiled_model(tiny_profiled, **options)
    for text, mode in ((0, "cold"), (2, "warm")):
        given = tiny_profiled.given([0], text)
        expected, plan = torch_path(given)
        assert_close(session.prefill(**given), expected)
        assert plan["mode"] == report_of(session)["mode"] == mode
        assert plan["rows_per_layer"] == report_of(session)["rows_per_layer"]
    rows = report_of(session)["rows_per_layer"]
    assert rows[0] > rows[1] == rows[2] > 10
    assert report_of(session)["explanations"] == ()


def test_session_groups_share_rows_under_any_policy(tiny: Exported, tiny_profile: Path) -> None:
    session = tiny.session(profile=tiny_profile, budget=0.3)
    assert session.manifest.decoder.layer_groups == (3,)
    session.prefill(**tiny.given([0]))
    session.prefill(**tiny.given([0], 2))
    report = report_of(session)
    assert report["mode"] == "warm"
    assert len(set(report["rows_per_layer"][:3])) == 1
    assert any("each group of layers has one set" in note for note in report["explanations"])


def test_session_cacheblend(tiny_blended: Exported) -> None:
    assert tiny_blended.manifest.decoder.layer_groups == (1, 1, 1)
    options = {"budget": 0.2}
    session = tiny_blended.session(**options)
    torch_path = compiled_model(tiny_blended, policy="cacheblend", **options)
    for text, mode in ((0, "cold"), (2, "warm")):
        given = tiny_blended.given([0], text)
        expected, plan = torch_path(given)
        assert_close(session.prefill(**given), expected)
        report = report_of(session)
        assert plan["mode"] == report["mode"] == mode
        assert plan["rows_per_layer"] == report["rows_per_layer"]
    num_tokens = given["input_ids"].shape[1]
    assert report["rows_per_layer"] == (num_tokens, num_tokens, num_tokens - 16, 2)
    assert report["timings_ms"]["probe"] > 0


def test_session_cacheblend_with_shared_rows(tiny: Exported) -> None:
    session = tiny.session(policy="cacheblend")
    with pytest.raises(PlanError, match=r"'cacheblend' needs rows of its own.*groups of \[3\] layers"):
        session.prefill(**tiny.given([0]))
    lenient = tiny.session(policy="cacheblend", strict=False)
    for text in (0, 1):
        assert_close(lenient.prefill(**tiny.given([0], text)), tiny.expected([0], text))
        report = report_of(lenient)
        assert (report["mode"], report["reason"]) == ("bypass", "the policy's rows make no plan")
    assert lenient.vlcache.stats()["plan_failures"] == 2


def test_session_shadow_runs(llava: Exported) -> None:
    session = llava.session(shadow=1.0)
    session.prefill(**llava.given([0]))
    assert_close(session.prefill(**llava.given([0], 2)), llava.expected([0], 2))
    assert report_of(session)["mode"] == "warm"
    assert report_of(session)["shadow_kl"] > 0


def test_sessions_share_donors_by_store_and_salt(llava: Exported) -> None:
    store = MemoryStore(1 << 28)
    llava.session(store=store).prefill(**llava.given([0]))
    for salt, mode in (("", "warm"), ("another tenant", "cold")):
        session = llava.session(store=store, salt=salt)
        session.prefill(**llava.given([0], 1))
        assert report_of(session)["mode"] == mode


def test_session_policy_of_one_call(llava: Exported) -> None:
    session = llava.session(policy="none", budget=0.0)
    session.prefill(**llava.given([0]))
    with session.vlcache.using(policy="full"):
        assert_close(session.prefill(**llava.given([0], 1)), llava.expected([0], 1))
    assert report_of(session)["token_layer_fraction"] == 1.0
    session.prefill(**llava.given([0], 2))
    assert report_of(session)["token_layer_fraction"] < 0.1


def test_prefill_with_features(qwen: Exported) -> None:
    session = qwen.session(policy="full")
    given = qwen.given([1, 0], 1)
    features = features_of(qwen, session, [1, 0])
    for name in ("pixel_values", "image_grid_thw"):
        del given[name]
    assert_close(session.prefill(**given, **features), qwen.expected([1, 0], 1))
    assert report_of(session)["encoder_hit"] is None


def test_prefill_features_without_required_positions(qwen: Exported) -> None:
    session = qwen.session()
    with pytest.raises(ExportError, match="position_ids"):
        session.prefill(input_ids=qwen.inputs([0])["input_ids"], **features_of(qwen, session, [0]))


IDS, PIXELS = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(16, 96)
REFUSED: list[tuple[dict[str, Tensor | None], str]] = [
    ({"input_ids": None}, "'input_ids' is missing"),
    ({"position_ids": None}, "'position_ids' is missing"),
    ({"image_grid_thw": None}, "'image_grid_thw' is missing"),
    ({"input_ids": IDS[0]}, r"'input_ids' has shape \[8\]"),
    ({"input_ids": IDS.expand(2, 8)}, r"'input_ids' has shape \[2, 8\]"),
    ({"position_ids": IDS.expand(2, 1, 8)}, r"'position_ids' has shape \[2, 1, 8\]"),
    ({"input_ids": IDS.int()}, "'input_ids' has dtype torch.int32"),
    ({"image_grid_thw": torch.tensor([[1, 2, 2]])}, "asks for 4 rows of pixels, 64 are given"),
    (
        {"pixel_values": PIXELS, "image_grid_thw": torch.tensor([[1, 4, 4]])},
        "no encoder was exported .*1x4x4.*1x8x8.*1x4x8",
    ),
    ({"pixel_values_videos": PIXELS}, "'pixel_values_videos': .* no video encoder"),
    ({"attention_mask": torch.zeros(1, 27)}, "attention_mask contains zeros"),
    ({"pixel_valeus": PIXELS}, "'pixel_valeus' is unknown"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=["-".join(change) for change, _ in REFUSED])
def test_prefill_bad_inputs(qwen: Exported, change: dict[str, Tensor | None], message: str) -> None:
    session = qwen.session()
    given = {name: value for name, value in {**qwen.given([0]), **change}.items() if value is not None}
    with pytest.raises(ExportError, match=message):
        session.prefill(**given)


BAD: dict[str, dict[str, Any]] = {
    "positions of another length": {"position_ids": torch.zeros(4, 1, 9, dtype=torch.int64)},
    "too few placeholders": {"input_ids": torch.zeros(1, 27, dtype=torch.int64)},
    "pixels of another width": {"pixel_values": torch.zeros(64, 5)},
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_prefill_recovers_after_bad_request(qwen: Exported, change: dict[str, Any], strict: bool) -> None:
    session = qwen.session(policy="full", strict=strict)
    with pytest.raises(ExportError):
        session.prefill(**{**qwen.given([0]), **change})
    assert_close(session.prefill(**qwen.given([1], 1)), qwen.expected([1], 1))
    assert report_of(session)["mode"] == "cold"
    assert_close(session.prefill(**qwen.given([1], 2)), qwen.expected([1], 2))
    assert report_of(session)["mode"] == "warm"


@pytest.mark.parametrize("rows", [20, 40], ids=["too few", "too many"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_prefill_recovers_after_mismatched_features(llava: Exported, rows: int, strict: bool) -> None:
    session = llava.session(policy="full", strict=strict)
    (name,) = session.manifest.encoders[0].features
    with pytest.raises(ExportError, match=r"placeholders|features"):
        session.prefill(input_ids=llava.inputs([0])["input_ids"], **{name: torch.zeros(rows, 64)})
    session.prefill(**llava.given([1], 1))
    assert report_of(session)["mode"] == "cold"


def test_decode_without_cache(llava: Exported) -> None:
    with pytest.raises(ExportError, match=r"past\.0\.key|present\.0\.key"):
        llava.session().decode(torch.tensor([[3]]), torch.tensor([[5]]), {})


def test_decode_without_graph(tiny: Exported) -> None:
    session = tiny.session()
    token = torch.tensor([[3]])
    with pytest.raises(ExportError, match=r"no decoding step: .*\['refused'\] states the reason"):
        session.decode(token, token, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowering": "eager"}, "'lowering' does not apply to exported graphs"),
        ({"dynamic": True}, "'dynamic' does not apply"),
        ({"cuda_graphs": True}, "'cuda_graphs' does not apply"),
        ({"budgte": 0.1}, "'budgte' .did you mean 'budget'"),
        ({"budget": 2}, "budget=2 is not valid"),
    ],
)
def test_session_bad_options(tiny: Exported, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        OnnxSession(tiny.folder, **options)


def test_prefill_one_token(llava: Exported) -> None:
    session, ids = llava.session(), torch.tensor([[7]])
    with torch.no_grad():
        expected = llava.model(input_ids=ids).logits
    assert_close({"logits": session.prefill(input_ids=ids)["logits"]}, {"logits": expected})
    assert report_of(session)["mode"] == "bypass"


def test_prefill_short_images_reuse_the_encoder_only(tiny: Exported) -> None:
    session = tiny.session(min_span_tokens=16)
    for text, hit in ((0, False), (1, True)):
        inputs = tiny_vlm_inputs(5 + text, 4, [(6, 0)], text_seed=text)
        with torch.no_grad():
            assert_close(session.prefill(**inputs), {"result.0": tiny.model(**inputs)})
        assert report_of(session)["encoder_hit"] is hit
        assert not any(span["hit"] for span in report_of(session)["spans"])


def test_salt_and_reports_of_a_call(tiny: Exported) -> None:
    session = tiny.session(policy="full")
    given = tiny.given([0])
    with session.vlcache.reports() as reports:
        for salt in ("a", "b", "a"):
            with session.vlcache.using(salt=salt):
                session.prefill(**given)
    assert [(report.mode, report.encoder_hit) for report in reports] == [
        ("cold", False),
        ("cold", False),
        ("warm", True),
    ]
    assert session.vlcache.clear(salt="a") == session.vlcache.clear(salt="b") > 0
    assert len(session.vlcache.store) == 0
