"""Ask about a picture twice, after two system prompts: the second call reuses it."""

from dataclasses import replace
from typing import Any

import vlcache_fx
from vlcache_fx.testing import reference_vlm


def main(**options: Any) -> list[str]:
    """Ask twice; return mode and answer of each call. ``options``: see ``vlcache_fx.compile``."""
    model = vlcache_fx.compile(reference_vlm.load_model(), **options)
    processor = reference_vlm.load_processor()
    question = reference_vlm.make_questions(count=1)[0]
    lines = []
    for prompt in ("you are a helpful assistant .", "look at the picture with care ."):
        asked = replace(question, system_prompt=prompt)
        (answer,) = reference_vlm.answer_questions(model, processor, [asked])
        lines.append(f"{model.vlcache.last_report['mode']}: {answer}")
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
