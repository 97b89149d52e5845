"""Steps of an optimizer, in one process or in several that share their gradients."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist


def world() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agreed(value: float) -> float:
    """Broadcast the first process's ``value``."""
    if dist.is_initialized():
        shared = torch.tensor([value])
        dist.broadcast(shared, 0)
        return float(shared)
    return value


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor | None, share: float) -> None:
    """One step with the mean gradient of all processes; ``share`` 0..1 scales the learning rates."""
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if dist.is_initialized() and loss is None:
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        flat = torch.cat([grad.reshape(-1) for grad in grads]).cpu()
        dist.all_reduce(flat)
        flat = flat.to(weights[0].device) / dist.get_world_size()
        for weight, part in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = share * group.setdefault("peak", group["lr"])
    optimizer.step()
    optimizer.zero_grad()


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate: a short warm-up, then a cosine down to 2 %."""
    return schedule_of(step / total, step)


def schedule_of(spent: float, step: int) -> float:
    """Share of the peak learning rate, from the finished share (0..1) of the training."""
    return min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * spent)))
