"""A small Qwen2.5-VL, trained from scratch on grids of scanned digits, with its processor and questions.

``load_model()`` and ``load_processor()`` replace ``from_pretrained``; ``make_questions()`` creates questions
with answers, ``answer_questions()`` and ``accuracy()`` score them. Heavy imports are deferred.
``examples/train_reference_vlm`` trained the weights.
"""

from vlcache_fx.testing.reference_vlm.data import (
    FAMILIES,
    Question,
    answer_text,
    ask_again,
    build_prompt,
    make_questions,
)
from vlcache_fx.testing.reference_vlm.evaluate import accuracy, answer_questions, next_words, prepare
from vlcache_fx.testing.reference_vlm.model import load_model, load_processor

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
