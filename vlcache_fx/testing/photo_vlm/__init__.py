"""A small LLaVA put together from real pretrained parts: SmolLM2-135M-Instruct and EfficientNet-Lite2."""

from vlcache_fx.testing.photo_vlm.data import FAMILIES, Question, ask_again, build_prompt, make_questions
from vlcache_fx.testing.photo_vlm.evaluate import accuracy, answer_questions, next_words, prepare
from vlcache_fx.testing.photo_vlm.model import ASSETS, load_model, load_processor

__all__ = [
    "ASSETS",
    "FAMILIES",
    "Question",
    "accuracy",
    "answer_questions",
    "ask_again",
    "build_prompt",
    "load_model",
    "load_processor",
    "make_questions",
    "next_words",
    "prepare",
]
