"""A small LLaVA put together from real pretrained parts: SmolLM2-135M-Instruct and EfficientNet-Lite2.

``load_model()`` and ``load_processor()`` give what ``from_pretrained`` gives for a published model;
``make_questions()`` gives questions with right answers, ``answer_questions()`` and ``accuracy()`` score them.
Nothing heavy is imported before a function is called. ``examples/train_photo_vlm`` made the projector and
the updates of the decoder.

What it can: say in one word which of ten kinds of things (those of CIFAR-10) a named cell of a board of small
pictures shows, and find the row of a column that holds a kind, on boards of up to 6 x 6 cells, with the
question before or after the picture. Whether two boards agree in a cell it does not know: its answers to that
are no better than guesses. What it cannot do at all: describe a picture, read text, know other things than
these, look at pictures that do not fill a cell. It was also trained to answer about pictures that saw
another question, as pictures from a cache have.
It learnt from photographs. The pictures that are shipped are drawings, of which it names about six in ten
(chance: one): ``evaluation.json`` in ``vlcache_fx_models`` has the figures, NOTICE.md the sources.
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
