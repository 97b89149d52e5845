"""The vision tower: its training, its files, and a fast forward pass for pictures of one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from examples.train_reference_vlm.training import BatchMaker, encoder_loss, token_codes
from vlcache_fx.testing.reference_vlm.images import MAX_ROWS

TOWER_FILE = "tower.safetensors"
ROWS = (2, MAX_ROWS)
"""Rows of the pictures: the decoder's training begins with small ones."""


def train_tower(model: Any, batches: BatchMaker, steps: int, seed: int, rate: float = 2e-3) -> float:
    """Train the tower to encode what each vision token shows, on its device; return the last mean loss."""
    tower = model.model.visual
    codes = token_codes(seed).to(tower.device)
    optimizer = torch.optim.AdamW(tower.parameters(), lr=rate, weight_decay=0.05)
    warm = max(1, min(50, steps // 20))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=warm / steps, div_factor=25.0, final_div_factor=2.0
    )
    recent = 0.0
    for step in range(steps):
        batch = {name: value.to(tower.device) for name, value in batches.encoder_batch(8, ROWS).items()}
        loss = encoder_loss(model, codes, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now = float(loss.detach())
        recent = now if step == 0 else 0.95 * recent + 0.05 * now
        if (step + 1) % 100 == 0:
            print(f"tower: step {step + 1}, loss {recent:.4f}", flush=True)
    return recent


def save_tower(model: Any, folder: Path) -> None:
    """Write the tower's weights to ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.cpu() for name, value in model.model.visual.state_dict().items()}, folder / TOWER_FILE
    )


def load_tower(model: Any, folder: Path) -> None:
    """Read the tower's weights from ``folder``."""
    from safetensors.torch import load_file

    model.model.visual.load_state_dict(load_file(folder / TOWER_FILE))
