"""SmolLM2-135M-Instruct as it was published, and passages of text that return behind other prompts.

Its decoder was not trained for reuse. A passage is an item as a picture is: its rows are marked with
``vlcache_fx.mark_spans``. The texts are the help topics of Python (``pydoc_data``). ``load_model()`` and
``load_processor()`` replace ``from_pretrained``; needs the packages of the photo VLM's decoder.
"""

from vlcache_fx.testing.smollm2.model import load_model, load_processor
from vlcache_fx.testing.smollm2.passages import (
    ANSWER_TOKENS,
    FAMILIES,
    Question,
    answer_text,
    ask_again,
    build_prompt,
    make_questions,
)

__all__ = [
    "ANSWER_TOKENS",
    "FAMILIES",
    "Question",
    "answer_text",
    "ask_again",
    "build_prompt",
    "load_model",
    "load_processor",
    "make_questions",
]
