"""Table of the comparison."""

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
    "vLLM / library",
    "rows computed",
    "encoder",
    "logprob difference",
)


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds, such as ``1,234 ms``."""
    return f"{1e3 * seconds:,.0f} ms"


def comparison_table(result: Comparison, parameters: int, dtype: str) -> Table:
    """Create a table with one line per case and library.

    Args:
        result: the comparison.
        parameters: number of the model's weights.
        dtype: name of the weights' dtype.
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
    """Explain the table."""
    return (
        "First token: from the photo's bytes and the prompt's ids. Ratios are medians of the ratios within"
        " each round. Libraries without caches compute every case like the first. Before the last case, all"
        " libraries receive other photos, until vLLM's encoder cache evicts the photo.\n"
        "Logprob difference: largest difference of the first token's log-probabilities from transformers', in"
        f" nats; for another photo in the same prompt it is {result.other_photo.largest:.3f}, for another"
        f" system prompt {result.other_system.largest:.3f}. The weights are random: the difference shows"
        " whether computations agree, not the quality of approximate answers.\n"
    )
