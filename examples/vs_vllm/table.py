"""The comparison as a table for people."""

from rich.table import Table

from examples.vs_vllm.answer import Answer
from examples.vs_vllm.cases import CASES
from examples.vs_vllm.comparison import COMPILED, EAGER, VLCACHE, VLLM, Comparison
from vlcache_fx.bench.rounds import Summary

LABELS = {
    VLLM: "vLLM",
    VLCACHE: "vlcache_fx",
    EAGER: "transformers (sdpa)",
    COMPILED: "torch.compile",
}
HEADINGS = (
    "first token",
    "lowest-highest",
    "vLLM / it",
    "rows computed",
    "encoder",
    "logprobs off by",
)


def milliseconds(seconds: float) -> str:
    """Rounded, with thousands apart."""
    return f"{1e3 * seconds:,.0f} ms"


def comparison_table(result: Comparison, parameters: int, dtype: str) -> Table:
    """One line per case and library.

    Args:
        result: what was measured.
        parameters: of the model.
        dtype: name of the weights' type.
    """
    rounds = len(result.answers["first"][VLLM])
    table = Table(
        title=f"Time to first token: {parameters / 1e6:.0f} M parameters, {dtype},"
        f" {result.num_tokens} tokens, {result.vision_tokens} of them a photo; median of {rounds}",
        title_style="bold",
    )
    table.add_column("case")
    table.add_column("library")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column("result")
    for case, found in result.answers.items():
        for number, (name, answers) in enumerate(found.items()):
            last = number == len(found) - 1
            table.add_row(
                CASES[case] if number == 0 else "", *_cells(result, case, name, answers), end_section=last
            )
    return table


def _cells(result: Comparison, case: str, name: str, answers: list[Answer]) -> list[str]:
    whole = Summary.of(result.seconds(case, name))
    answer = answers[-1]
    difference = result.differences[case].get(name)
    return [
        LABELS[name],
        milliseconds(whole.median),
        f"{1e3 * whole.low:,.0f}-{1e3 * whole.high:,.0f}",
        "" if name == VLLM else f"{result.ratio(case, name).median:.2f}",
        f"{answer.computed_tokens} / {answer.num_tokens}",
        "ran" if answer.encoder_runs else "skipped",
        "(the reference)" if difference is None else f"{difference.largest:.3f}",
        answer.reuse,
    ]


def notes(result: Comparison) -> str:
    """How to read the table."""
    return (
        "First token: from the photo's bytes and the prompt's ids. Ratios are medians of those within each"
        " round. Libraries that keep nothing compute every case as the first. Before the last case other"
        " photos pass, the same ones for all, until vLLM's encoder cache has dropped the photo.\n"
        "Logprobs off by: largest difference of the first token's log-probabilities from transformers', in"
        f" nats; another photo in the same prompt makes {result.other_photo.largest:.3f}, another system"
        f" prompt {result.other_system.largest:.3f}. The weights are random: that tells whether the same"
        " thing is computed, not how well an approximation answers.\n"
    )
