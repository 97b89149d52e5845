"""A small Qwen2.5-VL, trained from scratch on grids of scanned digits, with its processor and questions.

``load_model()`` and ``load_processor()`` give what ``from_pretrained`` gives for a published model;
``make_questions()`` gives questions with right answers, ``answer_questions()`` and ``accuracy()`` score them.
Nothing heavy is imported before a function is called. ``examples/train_reference_vlm`` made the weights.
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
