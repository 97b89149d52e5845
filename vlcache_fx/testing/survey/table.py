"""Formats outcomes in Markdown, and writes them into a document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlcache_fx.testing.survey.outcome import ENTRIES, Outcome

NAMED = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "llava", "llava_onevision", "internvl",
    "idefics3", "smolvlm", "mistral3", "llama4", "gemma3", "gemma4", "paligemma", "qwen3_5", "mllama",
)  # fmt: skip
"""Families with a separate row; the tests try each of them."""

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Format a table of the named families, lists of the others per result, and why some were not tried."""
    by_type = {outcome.model_type: outcome for outcome in outcomes}
    lines = [
        f"| family | class | {' | '.join(f'`{entry}`' for entry in ENTRIES)} | why not |",
        "|---|---|---|---|---|",
        *(row(by_type[name]) for name in NAMED if name in by_type and by_type[name].results),
    ]
    others = defaultdict(list)
    for outcome in outcomes:
        if outcome.model_type not in NAMED and outcome.results:
            others[_group(outcome)].append(outcome.model_type)
    if others:
        lines += ["", "Others, with the same test:", ""]
        lines += [f"- {group}: {', '.join(names)}" for group, names in sorted(others.items())]
    untried = [outcome for outcome in outcomes if not outcome.results]
    if untried:
        lines += ["", "Not tried:", ""]
        lines += [f"- {outcome.model_type}: {outcome.detail}" for outcome in untried]
    return "\n".join(lines)


def row(outcome: Outcome) -> str:
    """Format the family's row."""
    results = [outcome.results.get(entry, "not run") for entry in ENTRIES]
    name = f"`{outcome.model_class}`"
    return f"| {outcome.model_type} | {name} | {' | '.join(results)} | {outcome.detail} |"


def _group(outcome: Outcome) -> str:
    """Return the results in words, and why, if the family is not reused."""
    results = list(dict.fromkeys(outcome.results.values()))
    if len(results) > 1:
        results = [f"{result} through `{entry}`" for entry, result in outcome.results.items()]
    return "; ".join(results) + (f" ({outcome.detail})" if outcome.detail else "")


def write_into(document: Path, table: str) -> None:
    """Replace the text between the two marks of the document.

    Raises:
        ValueError: the document lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} has no lines {BEGIN!r} and {END!r}")
    document.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
