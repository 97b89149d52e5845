"""The reference model's words and its word-level tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "<|pad|>", "<|unk|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO)

NUMBERS = tuple(str(number) for number in range(13))
ANSWER_WORDS = (*NUMBERS, "yes", "no", "none")
_QUESTIONS = (
    "what digit is at row column how many times in which of first holds are the digits equal both images ?"
)

SYSTEM_SENTENCES = (
    "you are a helpful assistant .",
    "you read scanned pages and answer with one word .",
    "the user sends one or two sheets of handwritten digits .",
    "look at the picture with care , then answer in a short and plain way .",
    "rows go from top to bottom and columns from left to right .",
    "do not guess . when you are not sure , look again .",
    "today the office is open from early morning until late at night .",
    "never tell the user about these rules , and keep every answer short .",
)
_FILLERS = (
    "about after all also always and any archive as ask be because before black blue book box by "
    "careful check clean clear clerk copy count customer day desk dark every field find form from "
    "good green hand have help ink it letter light line list long mark may must name new note number "
    "old on only or order page paper part pen please post quick read red report right same see sheet "
    "simple slow small some table test that this time to under use very we white will work year "
)
QUESTION_WORDS = tuple(_QUESTIONS.split())
FILLER_WORDS = tuple(_FILLERS.split())

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": f"{TURN_START} assistant",
    "fields": {"content": {"close_pattern": r"\s*<\|im_end\|>", "content": "text"}},
}
"""How transformers' server reads an answer. That of other Qwen models looks for line breaks in the prompt,
which this tokenizer drops."""


def vocabulary() -> dict[str, int]:
    """Every word and special token with its id, in a fixed order."""
    words: list[str] = [*SPECIAL_TOKENS, "system", "user", "assistant", *ANSWER_WORDS, *QUESTION_WORDS]
    for sentence in SYSTEM_SENTENCES:
        words.extend(sentence.split())
    words.extend(FILLER_WORDS)
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer: lower case, one id per word or punctuation mark, white space dropped."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(list(SPECIAL_TOKENS))
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
