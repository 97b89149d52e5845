"""``vlcache explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, check_output_file, examples, result_console, stdout_for_json
from vlcache_fx.cli.progress import Steps, showing_progress
from vlcache_fx.cli.prompts import DATA
from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from vlcache_fx.explaining import Explanation
    from vlcache_fx.fidelity.prompts import Case
    from vlcache_fx.fidelity.subject import Subject


EPILOG = examples(
    "vlcache explain reference",
    "vlcache explain path/to/model --data prompts.jsonl --html page.html",
    "vlcache explain reference --graph",
    "vlcache explain reference --json",
)


def explain(
    model: Annotated[
        str, typer.Argument(help="reference, photo, hybrid, smollm2, or a folder of a transformers model")
    ],
    data: Annotated[Path | None, DATA] = None,
    html: Annotated[Path | None, typer.Option(help="write a page to this file")] = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="print one layer's graph before and after the passes, too")
    ] = False,
    as_json: Json = False,
    policy: Annotated[str, typer.Option(help="see vlcache policies")] = "layer_aware",
    budget: Annotated[float, typer.Option(help="share of token-layers to recompute")] = 0.02,
    profile: Annotated[
        Path | None, typer.Option(help="profile of this model, from vlcache calibrate")
    ] = None,
    lowering: Annotated[str, typer.Option(help="eager, inductor")] = "eager",
    predict: Annotated[
        bool, typer.Option(help="measure the rates of this machine, to predict times (seconds)")
    ] = True,
    seed: Annotated[int, typer.Option(help="seed of the model's own questions")] = 0,
) -> None:
    """Explain one request: a first prompt records its images, a second one with the same images is explained.

    Shows what became of each token, the rows that each layer computes, measured and predicted times, one
    layer's graph before and after the passes, what was not reused and why, and the donors.
    """
    with readable_errors(), stdout_for_json(as_json):  # libraries may print, too
        # deferred: importing torch takes a second
        from vlcache_fx.bench.predicted import with_predictions
        from vlcache_fx.fidelity.models import load_cases, load_subject

        if html is not None:
            check_output_file(html)
        families = () if data is not None else ("single_hop",)
        case = load_cases(model, data, families, 1, split="test", seed=seed)[0]
        options = {"lowering": lowering, "policy": policy, "budget": budget, "profile": profile}
        with showing_progress(f"loading {model}") as steps:
            subject = load_subject(model, None, options)
            found = _explained(subject, case, steps)
            if predict:
                steps.begin("measuring the rates of this machine")
                found = with_predictions(found, subject.model)
        if html is not None:
            _save(found, html)
    if as_json:
        typer.echo(found.to_json())
    elif html is None:
        result_console().print(found, *([found.layers()] if graph else []))


def _explained(subject: Subject, case: Case, steps: Steps) -> Explanation:
    """Run the first prompt of a case, and explain the second."""
    import torch

    from vlcache_fx.fidelity.subject import without_ids

    steps.begin("compiling and running the first prompt, which records the images")
    with torch.no_grad():
        subject.model(**without_ids(subject.inputs([case.donor])), logits_to_keep=1)
    steps.begin("explaining the second prompt")
    inputs = subject.inputs([case.asked])
    found = subject.engine.explain(**without_ids(inputs), logits_to_keep=1)
    return found.with_texts(subject.processor.tokenizer.decode, inputs["input_ids"].tolist())


def _save(found: Explanation, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    except OSError as error:
        raise OptionError(f"cannot write the page {str(path)!r}: {error}") from error
    typer.echo(f"wrote {path}", err=True)
