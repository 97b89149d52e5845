"""``vlcache gate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, examples, print_json, result_console, stdout_for_json
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.cli.prompts import DATA

if TYPE_CHECKING:
    from vlcache_fx.fidelity.gate import GateReport
    from vlcache_fx.fidelity.prompts import Case, Prompt

EPILOG = examples(
    "vlcache gate reference --count 10 --min-agreement 0.95",
    "vlcache gate path/to/model --data prompts.jsonl --max-kl 0.01 --json",
    "vlcache gate reference --exact-returns 0 --exact-returns 2",
)

NOT_PASSED = 2
"""Exit status where no budget passes; 1 is an error."""


class GateCommand(TyperCommand):
    """The command, with exit status 1 for wrong arguments: 2 says that the gate was not passed."""

    def make_context(self, *args: Any, **given: Any) -> Any:
        """Parse the arguments."""
        try:
            return super().make_context(*args, **given)
        except Exception as error:
            if getattr(error, "exit_code", 0) == NOT_PASSED:
                error.exit_code = 1  # type: ignore[attr-defined]
            raise


def gate(
    model: Annotated[
        str, typer.Argument(help="reference, photo, hybrid, smollm2, or a folder of a transformers model")
    ],
    data: Annotated[Path | None, DATA] = None,
    family: Annotated[list[str] | None, typer.Option(help="families of questions (default: all)")] = None,
    count: Annotated[int, typer.Option(min=1, help="questions per family")] = 10,
    min_agreement: Annotated[float, typer.Option(help="share of next tokens that must agree")] = 0.99,
    max_kl: Annotated[
        float | None, typer.Option(help="bound of the mean KL divergence, in nats (default: none)")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="shares of token-layers to try (default: 0.02 0.05 0.1 0.2)"),
    ] = None,
    exact_returns: Annotated[
        list[int] | None,
        typer.Option(min=0, help="numbers of first returns in full to try, for each budget (default: 0)"),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="which rows to recompute; see vlcache policies")
    ] = "layer_aware",
    profile: Annotated[
        Path | None, typer.Option(help="profile of this model, from vlcache calibrate")
    ] = None,
    donor_rank: Annotated[
        int, typer.Option(min=0, help="rank of the differences between contexts; 0 for none")
    ] = 0,
    seed: Annotated[int, typer.Option(help="seed of the questions")] = 0,
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "eager",
    as_json: Json = False,
) -> None:
    """Find the smallest budget that is accurate enough on your prompts, and the options to serve with.

    Prompts are replayed in order, one per call. Exit status 0 if a budget passes, 2 if none does, 1 after an
    error.
    """
    with readable_errors():
        with stdout_for_json(as_json):
            # deferred: importing torch takes a second
            from vlcache_fx.fidelity.gate import BUDGETS, check, check_bounds
            from vlcache_fx.fidelity.models import load_cases, load_subject

            budgets = tuple(budget or BUDGETS)
            check_bounds(min_agreement, max_kl, budgets)  # before it loads a model
            most = max(exact_returns or (0,))
            cases = load_cases(
                model, data, tuple(family or ()), count, split="test", seed=seed, contexts=1 + most
            )
            options = {"policy": policy, "profile": profile, "donor_rank": donor_rank, "lowering": lowering}
            with showing_progress(f"loading {model}") as steps:
                subject = load_subject(model, None, {**options, "strict": True})
                prompts = [subject.ask(prompt) for prompt in replayed(cases)]
                steps.begin("replaying prompts", len(prompts) * len(budgets) * len(exact_returns or (0,)))
                report = check(
                    subject.model,
                    prompts,
                    min_agreement=min_agreement,
                    max_kl=max_kl,
                    budgets=budgets,
                    exact_returns=exact_returns,
                    after_prompt=steps.advance,
                )
            chosen = None
            if report.passed:
                found = subject.engine.options
                chosen = {
                    "budget": found.budget,
                    "policy": policy,
                    "profile": None if profile is None else str(profile),
                    "donor_rank": found.donor_rank,
                    "exact_returns": found.exact_returns,
                    "donor_contexts": found.donor_contexts,
                }
        if as_json:
            print_json({"model": model, **report.as_dict(), "options": chosen})
        else:
            _show(report, chosen, model)
        if not report.passed:
            raise typer.Exit(NOT_PASSED)


def replayed(cases: list[Case]) -> list[Prompt]:
    """Return the prompts of cases in the order of traffic, each once: donor, other contexts, question."""
    return list(dict.fromkeys(one for case in cases for one in (case.donor, *case.others, case.asked)))


def _show(report: GateReport, options: dict[str, Any] | None, model: str) -> None:
    table = Table("budget", "exact returns", title=model, title_style="bold")
    for heading in (
        "contexts",
        "warm prompts",
        "agreement",
        "mean KL (nats)",
        "largest",
        "recomputed",
        "passed",
    ):
        table.add_column(heading, justify="right")
    for trial in report.trials:
        table.add_row(
            f"{100 * trial.budget:g} %",
            str(trial.exact_returns),
            f"{trial.donor_contexts:.1f}",
            str(trial.num_warm),
            f"{100 * trial.agreement:.1f} %",
            f"{trial.mean_kl:.2g}",
            f"{trial.max_kl:.2g}",
            f"{100 * trial.token_layer_fraction:.1f} %",
            "yes" if trial.passed else "no",
        )
    console = result_console()
    console.print(table)
    bounds = f"agreement of at least {100 * report.min_agreement:g} %"
    if report.max_kl is not None:
        bounds += f", mean KL of at most {report.max_kl:g} nats"
    if options is None:
        console.print(f"Not passed ({bounds}): serve without reuse, or try larger budgets.", highlight=False)
        return
    flags = [
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, float)
        else f"--{name.replace('_', '-')} {value}"
        for name, value in options.items()
        if value is not None
    ]
    console.print(f"Passed ({bounds}). Options for vlcache serve:", highlight=False)
    console.print(" ".join(flags), highlight=False)
