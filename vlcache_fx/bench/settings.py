"""Settings of a benchmark."""

import dataclasses
import importlib.util
import itertools

from vlcache_fx.bench.systems import Variant
from vlcache_fx.bench.workload import RequestShape
from vlcache_fx.errors import OptionError
from vlcache_fx.options import Options
from vlcache_fx.policies import get_policy

PACKAGES = {
    "transformers": "transformers",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
}
"""Optional packages that a benchmark needs: imported name -> name to install."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a benchmark.

    Attributes:
        vision_tokens: tokens per image; empty for the preset's.
        images, batch: every combination with every number of vision tokens is a point.
        text_before, text_after: text tokens; see ``RequestShape``.
        variants: policies, budgets and stores; at least one.
        dtype, device: names, or ``auto``.
        rounds: timing rounds per point; ``eager_rounds`` of them with the eager model.
        lowering: lowering of both compiled models.
        cuda_graphs: option of the model compiled for reuse; no effect without a GPU.
        encoder: time the vision encoder.
        compile_layers: numbers of layers for compile times; empty for none.
        store_entries: store sizes for lookup times, ascending; empty for none.

    Raises:
        OptionError, PolicyError: a value is not valid.
    """

    vision_tokens: tuple[int, ...] = ()
    images: tuple[int, ...] = (1,)
    batch: tuple[int, ...] = (1,)
    text_before: int = 20
    text_after: int = 40
    variants: tuple[Variant, ...] = (Variant(),)
    dtype: str = "auto"
    device: str = "auto"
    rounds: int = 5
    eager_rounds: int = 1
    lowering: str = "inductor"
    cuda_graphs: bool = False
    encoder: bool = True
    compile_layers: tuple[int, ...] = ()
    store_entries: tuple[int, ...] = (100, 1_000, 10_000, 100_000)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.eager_rounds < 0:
            raise OptionError(
                f"rounds={self.rounds} must be positive, and eager_rounds={self.eager_rounds} not negative"
            )
        if not (self.images and self.batch and self.variants):
            raise OptionError("images, batch and variants must not be empty")
        for variant in self.variants:
            Options(policy=variant.policy, budget=variant.budget, lowering=self.lowering)
            get_policy(variant.policy)
        for depth in self.compile_layers:
            if depth < 1:
                raise OptionError(f"compile_layers={depth} is not valid: it must be a positive integer")

    def shapes(self, vision_tokens: tuple[int, ...]) -> list[RequestShape]:
        """Return the request shapes of all points."""
        return [
            RequestShape(tokens, images, batch, self.text_before, self.text_after)
            for images, batch, tokens in itertools.product(self.images, self.batch, vision_tokens)
        ]


def require_packages() -> None:
    """Check that optional packages are installed.

    Raises:
        OptionError: an optional package is not installed; the message names it.
    """
    missing = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(
            f"vlcache bench needs {', '.join(missing)}: pip install 'vlcache_fx[transformers,demo]'"
        )
