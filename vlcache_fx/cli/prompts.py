"""Options for prompts, of ``vlcache explain``, ``fidelity``, ``calibrate`` and ``gate``."""

from __future__ import annotations

import typer

DATA = typer.Option(
    help="prompts, one JSON object per line: images (paths), prompt, answer; repeated images are reused "
    "(default: the model's own questions)"
)
POSITIONS = typer.Option(
    help="maximum number of answer tokens to compare (default: those of the model's own questions, or 1)"
)
