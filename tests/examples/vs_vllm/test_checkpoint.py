import json
from pathlib import Path

import pytest
import torch

from examples.vs_vllm.checkpoint import SPECIAL, TAG, TINY, WORDS, read_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "checkpoint"
    write_checkpoint(TINY, 16, folder)
    return folder


def test_read_model_dtype(checkpoint: Path) -> None:
    model = read_model(checkpoint)
    assert model.dtype == torch.float32
    assert model.config.text_config.num_hidden_layers == TINY.layers
    assert not model.training


def test_write_checkpoint_is_reproducible(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(TINY, 16, tmp_path)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes()


def test_write_checkpoint_keeps_weights_and_updates_processor(tmp_path: Path) -> None:
    write_checkpoint(TINY, 16, tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    write_checkpoint(TINY, 64, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == settings["size"]["longest_edge"] == 64 * 28**2


def test_write_checkpoint_replaces_incomplete_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(TINY, 16, tmp_path)
    (tmp_path / TAG).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"half")
    write_checkpoint(TINY, 16, tmp_path)
    read_model(tmp_path)


def test_tokenizer_has_a_word_per_id(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    assert len(tokenizer) == TINY.vocabulary
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL} == SPECIAL
    assert tokenizer("<|vision_start|><|image_pad|><|vision_end|> w9").input_ids == [4, 2, 5, 9]
    assert len(SPECIAL) == WORDS
