"""PEFT adapters: the inner model is compiled, and changes of adapters between calls are detected."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import vlcache_fx
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl

from ..runtime.helpers import distance, own_compiler_state

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # from peft and its imports


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def adapted(targets: Any) -> Any:
    """Return a model with two adapters whose weights are not zero."""
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_qwen2_5_vl(1), config)
    model.add_adapter("other", config)
    return model.eval()


class Pair:
    def __init__(self, targets: Any) -> None:
        self.reference = adapted(targets)
        self.model = vlcache_fx.compile(copy.deepcopy(self.reference), policy="full", lowering="eager")

    def run(self, seed: int) -> str:
        inputs = qwen_inputs(3, 4, [(8, 8, 0)], seed)
        with torch.no_grad():
            assert distance(self.model(**inputs), self.reference(**inputs)) < 1e-5
        mode: str = self.model.vlcache.last_report["mode"]
        return mode


def scale(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 3.0


# In this order, to one model: to compile it takes longer than the changes.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "scaled": scale,
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "other weights": lambda model: [
        weight.data.mul_(2) for name, weight in model.named_parameters() if "lora_B.default" in name
    ],
    "switched": lambda model: model.set_adapter("other"),
    "deleted": lambda model: (model.set_adapter("other"), model.delete_adapter("default")),
    "merged": lambda model: model.merge_adapter(),
}  # fmt: skip


@pytest.fixture(scope="module")
def reused(_compiler: None) -> Pair:
    return Pair(["q_proj", "v_proj"])


@pytest.mark.works("Adapters", "LoRA of PEFT")
def test_compile_unwraps_the_peft_model(reused: Pair) -> None:
    assert [reused.run(seed) for seed in range(2)] == ["cold", "warm"]
    assert reused.model.vlcache is reused.model.get_base_model().vlcache
    inputs = qwen_inputs(3, 4, [(8, 8, 0)], 7)
    ours, theirs = (
        one.generate(**inputs, max_new_tokens=2, do_sample=False) for one in (reused.model, reused.reference)
    )
    assert torch.equal(ours, theirs)
    assert reused.model.vlcache.last_report["mode"] == "warm"


@pytest.mark.works("Adapters", "`disable_adapter()` for some calls")
def test_peft_adapters_disabled_temporarily(reused: Pair) -> None:
    reused.run(0)
    with reused.model.disable_adapter(), reused.reference.disable_adapter():
        modes = [reused.run(seed) for seed in range(8, 10)]
    assert modes == ["cold", "warm"]
    assert reused.run(10) == "warm"


@pytest.fixture(scope="module")
def changed(_compiler: None) -> Pair:
    return Pair(["q_proj", "v_proj"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=pytest.mark.works("Adapters", f"adapter {name} between calls"))
        for name, change in CHANGES.items()
    ],
)
def test_peft_adapters_changed_between_calls(changed: Pair, change: Callable[[Any], Any]) -> None:
    pair = changed
    pair.run(0)
    for model in (pair.model, pair.reference):
        change(model)
    assert [pair.run(seed) for seed in range(1, 3)][-1] == "warm"


VISION = r".*visual.*\.(qkv|proj)"


@pytest.mark.works("Adapters", "LoRA in the encoder")
@pytest.mark.parametrize("change", ["disabled", "scaled"])
def test_peft_adapters_of_the_encoder(change: str) -> None:
    pair = Pair(VISION)
    pair.run(0)
    if change == "scaled":
        for model in (pair.model, pair.reference):
            scale(model)
        pair.run(1)
    else:
        with pair.model.disable_adapter(), pair.reference.disable_adapter():
            pair.run(1)
