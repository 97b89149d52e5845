"""Training of the hybrid model: rows, operators that equal the model's, steps, and the command."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5 import modeling_qwen3_5

from examples.train_hybrid_vlm.__main__ import main, parse
from examples.train_hybrid_vlm.batches import (
    Clock,
    Conversations,
    conversations_of,
    finish,
    load_batches,
    to_device,
)
from examples.train_hybrid_vlm.config import hybrid_config
from examples.train_hybrid_vlm.conversations import (
    KINDS,
    NO_KIND,
    Arrays,
    RowRecipe,
    make_batch,
    recipes,
)
from examples.train_hybrid_vlm.convolution import CausalConvolution
from examples.train_hybrid_vlm.decoder import initialise_recurrent, losses
from examples.train_hybrid_vlm.delta_rule import UnitLowerInverse, delta_rule
from examples.train_hybrid_vlm.optimizers import BatchedMuon
from examples.train_hybrid_vlm.pictures import Pictures
from examples.train_hybrid_vlm.steps import Steps
from examples.train_hybrid_vlm.trainer import Trainer
from examples.train_reference_vlm.packing import IGNORE
from examples.train_reference_vlm.training import initialise
from vlcache_fx.testing.hybrid_vlm import FAMILIES, load_model, load_processor
from vlcache_fx.testing.reference_vlm.images import render_grids
from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor
from vlcache_fx.testing.reference_vlm.scans import load_scans
from vlcache_fx.testing.reference_vlm.vocabulary import IMAGE, vocabulary

WORDS = vocabulary()
CELL = RowRecipe(("cell",), False, 0, 3, rows=(2, 2), system_words=5, length=128)
SAME_FIRST = RowRecipe(("same",), True, 0, 1, rows=(2, 3), system_words=5, length=128)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made: Any = Qwen3_5ForConditionalGeneration(hybrid_config(len(WORDS), WORDS))
    initialise(made)
    initialise_recurrent(made)
    made.model.visual.requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def pictures(model: Any) -> Pictures:
    return Pictures(model.model.visual, load_scans("train"), 0, variants=1)


def made(recipe: RowRecipe, count: int = 2) -> Arrays:
    return make_batch(WORDS, np.random.default_rng(0), load_scans("train"), recipe, count)


def on_cpu(arrays: Arrays, pictures: Pictures) -> dict[str, torch.Tensor]:
    return finish(to_device(arrays, torch.device("cpu")), pictures, 1.0, torch.float32)


@pytest.mark.parametrize("tokens", [1, 31, 70])
def test_delta_rule_equals_transformers(tokens: int) -> None:
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(2, tokens, 3, 16) for _ in range(3))
    key = key + 3.0 * torch.randn(2, 1, 3, 16)  # keys that are alike
    decay, beta = -torch.rand(2, tokens, 3) * torch.tensor([0.01, 0.3, 6.0]), torch.rand(2, tokens, 3)
    wanted = torch.randn(2, tokens, 3, 16)
    found = []
    for rule in (delta_rule, modeling_qwen3_5.torch_chunk_gated_delta_rule):
        inputs = [x.clone().requires_grad_() for x in (query, key, value, decay, beta)]
        if rule is delta_rule:
            rows = delta_rule(*inputs)
        else:
            q, k, v, g, b = inputs
            rows = rule(q, k, v, g=g, beta=b, use_qk_l2norm_in_kernel=True)[0]
        found.append((rows, *torch.autograd.grad((rows * wanted).sum(), inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_inverse_and_its_gradient() -> None:
    torch.manual_seed(0)
    lower = torch.randn(3, 8, 8, dtype=torch.float64).tril(-1).requires_grad_()
    inverse = UnitLowerInverse.apply(lower)
    torch.testing.assert_close(inverse, torch.linalg.inv(torch.eye(8, dtype=torch.float64) + lower))
    assert torch.autograd.gradcheck(lambda x: UnitLowerInverse.apply(x.tril(-1)), (lower,))


def test_muon_equals_torch() -> None:
    torch.manual_seed(0)
    shapes = [(8, 16), (8, 16), (16, 8), (8, 8)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    mine = BatchedMuon(ours, lr=0.01)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn(left.shape)
            right.grad = left.grad.clone()
        mine.step()
        other.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-3)


def test_pictures_equal_processor_and_tower(model: Any, pictures: Pictures) -> None:
    ink = torch.rand(2, 3, 10, 8, 8)
    patches, grids = ReferenceImageProcessor().patchify(render_grids(ink.numpy()))
    mine = pictures.patches(ink)
    torch.testing.assert_close(mine, torch.from_numpy(patches))
    with torch.no_grad():
        theirs = model.model.visual(torch.from_numpy(patches), torch.from_numpy(grids)).pooler_output
        found = pictures.encode(mine.view(2, -1, mine.shape[-1]), 3)
    torch.testing.assert_close(found.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", [CELL, SAME_FIRST], ids=["cell", "same before"])
def test_forward_equals_model(model: Any, pictures: Pictures, recipe: RowRecipe) -> None:
    arrays = made(recipe)
    batch = on_cpu(arrays, pictures)
    ids = batch["input_ids"].long()
    embeds = model.model.language_model.embed_tokens(ids)
    rows, tokens = (batch["vision_index"] >= 0).nonzero(as_tuple=True)
    vision = batch["features"][rows, batch["vision_index"][rows, tokens].long()]
    embeds = embeds.index_put((rows, tokens), vision)
    grids = torch.tensor([[1, grid.shape[1] * 2, 20] for grid in scans_of(arrays)] * len(ids))
    types = (ids == WORDS[IMAGE]).int()
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids)
    assert torch.equal(positions, batch["position_ids"].long())
    with torch.no_grad():
        logits = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits
        found = losses(model, batch, batch["features"], torch.float32)
    asking = batch["asking"].long()
    places = torch.stack([asking, asking + 1], -1).flatten(1)
    wanted = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1]))
    expected = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), batch["labels"].flatten().long())
    torch.testing.assert_close(found.answers, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.right, wanted[:, ::2].argmax(-1) == batch["labels"][:, ::2])


def scans_of(arrays: Arrays) -> list[Any]:
    return [arrays[name] for name in ("scans_1", "scans_2") if name in arrays]


def test_guide_equals_model_attention(model: Any, pictures: Pictures) -> None:
    batch = on_cpu(made(CELL, 1), pictures)
    ids = batch["input_ids"].long()
    embeds = model.model.language_model.embed_tokens(ids).detach()
    seen = batch["vision_index"][0] >= 0
    embeds[0, seen] = batch["features"][0, : int(seen.sum())]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(
                inputs_embeds=embeds, position_ids=batch["position_ids"].long(), output_attentions=True
            )
            found = losses(model, batch, batch["features"], torch.float32)
    finally:
        model.set_attn_implementation("sdpa")
    weights = out.attentions[0][0, 0]
    asked = int((batch["kind"][0] != NO_KIND).sum())
    cells = [weights[int(batch["asking"][0, n]), int(batch["cells"][0, n, 0])] for n in range(asked)]
    torch.testing.assert_close(found.guide, -torch.stack(cells).log().mean(), atol=1e-3, rtol=1e-3)


def test_rows_are_conversations() -> None:
    arrays = made(CELL, 4)
    text = {index: word for word, index in WORDS.items()}
    for number in range(4):
        words = [text[int(i)] for i in arrays["input_ids"][number]]
        end = words.index("<|pad|>") if "<|pad|>" in words else len(words)
        assert set(words[end:]) <= {"<|pad|>"}
        asked = int((arrays["kind"][number] != NO_KIND).sum())
        assert asked >= 2
        for slot in range(asked):
            token = int(arrays["asking"][number, slot])
            assert words[token - 2 : token + 1] == ["<|im_end|>", "<|im_start|>", "assistant"]
            answer = [text[int(i)] for i in arrays["labels"][number, 2 * slot : 2 * slot + 2]]
            assert words[token + 1 : token + 3] == answer
            assert answer[1] == "<|im_end|>"
            assert words[int(arrays["cells"][number, slot, 0])] == IMAGE
        assert (arrays["labels"][number, 2 * asked :] == IGNORE).all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_recipe_fits_its_rows(share: float) -> None:
    rng = np.random.default_rng(1)
    kinds = set()
    for recipe in recipes(share):
        arrays = make_batch(WORDS, rng, load_scans("train"), recipe, 3)
        assert arrays["input_ids"].shape == (3, recipe.length)
        kinds |= set(arrays["kind"].flatten().tolist())
    assert kinds >= set(range(len(KINDS))) - {NO_KIND - len(FAMILIES)} - {KINDS.index("cell before")}


def test_longest_conversations_fit() -> None:
    rows = {recipe.shape: recipe for recipe in recipes(1.0)}
    for recipe in rows.values():
        highest = RowRecipe(**{**vars(recipe), "rows": (12, 12)})
        arrays = make_batch(WORDS, np.random.default_rng(2), load_scans("train"), highest, 60)
        assert (arrays["kind"][:, 0] != NO_KIND).all()


def test_workers_share_the_kinds_of_batches() -> None:
    clock = Clock(time.time(), 1e9)
    batches: Iterator[Arrays] = iter(load_batches(clock, 192, 0, 2))
    shapes = [next(batches)["input_ids"].shape[1] for _ in range(6)]
    assert shapes == [recipe.length for recipe in recipes(0.0)[:6]]
    alone = iter(Conversations(clock, 192, 0))
    assert [next(alone)["input_ids"].shape[1] for _ in range(6)] == shapes
    del batches


def test_step_lowers_the_loss(model: Any, pictures: Pictures) -> None:
    batch = on_cpu(made(CELL, 4), pictures)
    batch.pop("kind")
    steps = Steps(model, torch.float32, graphs=False)
    matrices = [w for w in steps.weights if w.ndim == 2]
    optimizer = BatchedMuon(matrices, lr=2e-3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = []
    for _ in range(4):
        found.append(steps.run(batch))
        optimizer.step()
    model.load_state_dict(before)
    assert float(found[-1].answers) < 0.9 * float(found[0].answers)
    assert float(found[-1].guide) < float(found[0].guide)


def test_training_goes_on_without_graphs(
    model: Any, pictures: Pictures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Steps, batch: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Steps, "_capture", fail)
    batch = on_cpu(made(CELL), pictures)
    batch.pop("kind")
    eager = Steps(model, torch.float32, graphs=False).run(batch)
    steps = Steps(model, torch.float32, graphs=True)
    assert torch.equal(steps.run(batch).answers, eager.answers)
    assert not steps.graphs
    assert "no CUDA graphs: RuntimeError: operation not permitted" in capsys.readouterr().out


def test_warm_up_knows_every_shape(model: Any, pictures: Pictures, tmp_path: Path) -> None:
    """No graph is captured while other processes make batches."""

    class Recorder:
        def __init__(self) -> None:
            self.shapes: set[Any] = set()

        def run(self, batch: dict[str, torch.Tensor]) -> None:
            self.shapes.add(tuple(sorted((name, tuple(value.shape)) for name, value in batch.items())))

    options = parse(
        ["--tower", str(tmp_path), "--output", str(tmp_path), "--device", "cpu", "--tokens", "360"]
    )
    warm, used = Recorder(), Recorder()
    trainer: Any = Trainer(options)
    trainer.warm_up(warm, pictures)
    for share in (0.0, 0.4, 0.9):
        for recipe in recipes(share):
            batch = on_cpu(made(recipe, conversations_of(recipe, options.tokens)), pictures)
            batch.pop("kind")
            used.run(batch)
    assert used.shapes == warm.shapes


def test_steps_wait_for_no_value() -> None:
    """A CUDA graph cannot hold operators whose shapes depend on values; fake tensors refuse them."""
    arrays = made(CELL)
    with FakeTensorMode():
        fake: Any = Qwen3_5ForConditionalGeneration(hybrid_config(len(WORDS), WORDS))
        fake.model.visual.requires_grad_(False)
        batch = {name: torch.empty(value.shape, dtype=torch.int16) for name, value in arrays.items()}
        batch |= {"features": torch.empty(2, 240, 128), "guide_weight": torch.empty(())}
        steps = Steps(fake, torch.bfloat16, graphs=False)
        found = steps.run(batch)
    assert found.answers.shape == ()
    assert found.right.shape == (2, 3)


def test_training_tiny_settings(tmp_path: Path) -> None:
    tower = ["--tower", str(tmp_path / "tower"), "--tower-steps", "2", "--device", "cpu"]
    assert main([*tower, "--tower-only"]) == {}
    short = ["--seconds", "60", "--evaluation-seconds", "59", "--tokens", "384", "--questions", "1"]
    report = main([*tower, *short, "--output", str(tmp_path / "model")])
    assert set(report["accuracy"]) == set(FAMILIES)
    assert report["steps"]["decoder"] >= 1
    written = json.loads((tmp_path / "model/evaluation.json").read_text(encoding="utf-8"))
    assert written == report
    reloaded = load_model(folder=tmp_path / "model")
    assert not reloaded.training
    assert load_processor(tmp_path / "model").image_token_id == reloaded.config.image_token_id


def test_convolution_and_its_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.nn.functional.conv1d(x.mT, weight[:, None], padding=3, groups=3)[..., :5].mT
    torch.testing.assert_close(CausalConvolution.apply(x, weight), rows)
    assert torch.autograd.gradcheck(CausalConvolution.apply, (x, weight))
