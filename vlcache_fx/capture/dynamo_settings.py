"""Dynamo's settings for models that are traced for reuse, in one place."""

from typing import Any

RECOMPILE_LIMIT = 256
"""Per code object, after which Dynamo compiles it no more.

One forward serves prompts with and without images, decoding steps, beams, samples and batches, each static
first and then symbolic: more forms than Dynamo's own limit allows. And models of the transformers library
have one code object in common, the wrapper that decorates their ``forward``.
"""

DYNAMO_CONFIG: dict[str, Any] = {
    # Models check on the way that placeholders and features agree; with scalars captured, that check does not
    # cut the graph in two.
    "capture_scalar_outputs": True,
    # Features that are added at masked places of inner layers have a size that depends on data.
    "capture_dynamic_output_shape_ops": True,
    "recompile_limit": RECOMPILE_LIMIT,
    # Else a call fails while another thread traces, whatever it traces.
    "force_compile_during_fx_trace": True,
}
"""For a ``forward`` that is given what encoders gave: the encoders themselves do not trace with them."""
