"""Dynamo's settings."""

from typing import Any

RECOMPILE_LIMIT = 256
"""Number of compilations of a code object after which Dynamo runs it uncompiled.

One ``forward`` is compiled for prompts with and without images, decoding steps, beams, samples and batches,
first with static and then with symbolic sizes: more often than Dynamo's own limit allows. And all models of
the transformers library share one code object, the wrapper that decorates their ``forward``.
"""

DYNAMO_CONFIG: dict[str, Any] = {
    # Models compare the numbers of placeholders and features: a graph break unless scalars are captured.
    "capture_scalar_outputs": True,
    # Deepstack features have a data-dependent size.
    "capture_dynamic_output_shape_ops": True,
    "recompile_limit": RECOMPILE_LIMIT,
    # Otherwise calls fail while another thread traces.
    "force_compile_during_fx_trace": True,
}
"""For ``vlcache_fx.compile``, ``explain`` and the plain ``torch.compile`` of benches.

They are for a ``forward`` on encoder outputs: encoders do not trace with them.
"""
