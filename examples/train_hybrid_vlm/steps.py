"""Forward and backward passes: captured as CUDA graphs, one per shape, or eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.train_hybrid_vlm.decoder import Batch, Losses, losses

Shape = tuple[tuple[str, tuple[int, ...]], ...]
WARM_UP = 3


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with the tensors that it reads and writes."""

    graph: Any
    inputs: Batch
    found: Losses


class Steps:
    """Adds the gradients of a batch to those of the model's trained weights.

    Gradients stay where they are in memory: graphs write there. ``graphs`` turns False when a capture fails.
    """

    def __init__(self, model: Any, precision: torch.dtype, graphs: bool) -> None:
        self.model, self.precision, self.graphs = model, precision, graphs
        self.weights: Sequence[Tensor] = [w for w in model.parameters() if w.requires_grad]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.grads: list[Tensor] = [weight.grad for weight in self.weights if weight.grad is not None]
        self.captured: dict[Shape, Captured] = {}
        self.pool: Any = None

    def run(self, batch: Batch) -> Losses:
        """Compute losses and gradients; ``batch`` has ``features`` and ``guide_weight`` beside the rest."""
        if not self.graphs:
            return self._compute(batch)
        shape: Shape = tuple((name, tuple(value.shape)) for name, value in sorted(batch.items()))
        if shape not in self.captured:
            try:
                self.captured[shape] = self._capture(batch)
            except Exception as error:  # noqa: BLE001  (whatever it is, training goes on without graphs)
                print(f"no CUDA graphs: {type(error).__name__}: {error}", flush=True)
                self.graphs = False
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                return self._compute(batch)
        captured = self.captured[shape]
        for name, value in captured.inputs.items():
            value.copy_(batch[name])
        captured.graph.replay()
        found = captured.found
        return Losses(found.answers.clone(), found.guide.clone(), found.right.clone())

    def _compute(self, batch: Batch) -> Losses:
        torch._foreach_zero_(self.grads)
        found = losses(self.model, batch, batch["features"], self.precision)
        total = found.answers + batch["guide_weight"] * found.guide
        total.backward()  # type: ignore[no-untyped-call]
        for grad in self.grads:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        return Losses(found.answers.detach(), found.guide.detach(), found.right)

    def _capture(self, batch: Batch) -> Captured:
        inputs = {name: value.clone() for name, value in batch.items()}
        run: Callable[[], Losses] = lambda: self._compute(inputs)  # noqa: E731
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph: Any = torch.cuda.CUDAGraph()
        # Graphs share memory: what one of them returns is copied before another runs.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            found = run()
        return Captured(graph, inputs, found)
