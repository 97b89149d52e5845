"""A small LLaVA from pretrained parts: SmolLM2-135M-Instruct and EfficientNet-Lite2.

``load_model()`` and ``load_processor()`` replace ``from_pretrained``; ``make_questions()`` creates questions
with answers, ``answer_questions()`` and ``accuracy()`` score them. Heavy imports are deferred.
``examples/train_photo_vlm`` trained the projector and the updates of the decoder.

It names in one word which of ten kinds (those of CIFAR-10) a cell of a board of small pictures shows, and
finds the row of a column with a given kind, on boards of up to 6 x 6 cells, with the question before or after
the picture. It cannot compare two boards: these answers are guesses. It cannot describe pictures, read text,
recognise other kinds, or see pictures that do not fill a cell. Training included pictures that attended to
another question, as donors do.
The training data are photographs, the shipped pictures drawings: it names about six in ten (chance: one).
``evaluation.json`` in ``vlcache_fx_models`` has the figures, NOTICE.md the sources.
"""

from vlcache_fx.testing.photo_vlm.data import FAMILIES, Question, ask_again, build_prompt, make_questions
from vlcache_fx.testing.photo_vlm.evaluate import accuracy, answer_questions, next_words, prepare
from vlcache_fx.testing.photo_vlm.model import load_model, load_processor
from vlcache_fx.testing.photo_vlm.words import answer_text

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
