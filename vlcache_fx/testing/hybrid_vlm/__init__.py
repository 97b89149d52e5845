"""A small Qwen3.5, trained from scratch on grids of scanned digits: recurrent layers and attention.

Questions, processor and interface are those of ``vlcache_fx.testing.reference_vlm``. Three of four decoder
layers are gated delta rules. Heavy imports are deferred. ``examples/train_hybrid_vlm`` trained the weights.
"""

from vlcache_fx.testing.hybrid_vlm.model import load_model, load_processor
from vlcache_fx.testing.reference_vlm.data import (
    FAMILIES,
    Question,
    answer_text,
    ask_again,
    build_prompt,
    make_questions,
)
from vlcache_fx.testing.reference_vlm.evaluate import accuracy, answer_questions, next_words, prepare

__all__ = [
    "FAMILIES",
    "Question",
    "accuracy",
    "answer_questions",
    "answer_text",
    "ask_again",
    "build_prompt",
    "load_model",
    "load_processor",
    "make_questions",
    "next_words",
    "prepare",
]
