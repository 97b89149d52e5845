"""The one set of Dynamo's settings."""

from typing import Any

RECOMPILE_LIMIT = 256
"""Per code object, after which Dynamo compiles it no more.

One forward serves prompts with and without images, decoding steps, beams, samples and batches, each static
first and then symbolic: more forms than Dynamo's own limit allows. And models of the transformers library
have one code object in common, the wrapper that decorates their ``forward``.
"""

DYNAMO_CONFIG: dict[str, Any] = {
    # Models check that placeholders and features agree: without captured scalars, that is a graph break.
    "capture_scalar_outputs": True,
    # Features that are added at masked positions of inner layers have a data-dependent size.
    "capture_dynamic_output_shape_ops": True,
    "recompile_limit": RECOMPILE_LIMIT,
    # Else a call fails while another thread traces, whatever it traces.
    "force_compile_during_fx_trace": True,
}
"""For ``vlcache_fx.compile``, ``explain`` and the plain ``torch.compile`` of benches.

They are for a ``forward`` that takes encoder outputs: encoders themselves do not trace with them.
"""
