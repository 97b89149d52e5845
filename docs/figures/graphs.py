"""Prints and draws the graphs of one small example into the manual: ``python docs/figures/graphs.py``.

A vision-language model of two layers is asked about an image of 20 tokens, then about the same image at
another position. Everything shown is taken from the graphs and the reports of these two calls.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, fx

matplotlib.use("svg")
from matplotlib import pyplot as plt

import vlcache_fx
from vlcache_fx.ir.captured import InputKind
from vlcache_fx.passes import Pipeline
from vlcache_fx.passes.standard import WARM, warm_program
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

DOCS = Path(__file__).parents[1]
FIRST, SECOND = tiny_vlm_inputs(3, 2, [(20, 0)]), tiny_vlm_inputs(6, 4, [(20, 0)])
"""25 tokens, the image at 3; 30 tokens, the same image at 6."""
SHAPE = {"hidden": 32, "heads": 4}
"""No width is as large as a number of rows."""
BUDGET = 0.1
"""Of the image's 20 tokens, two."""

ROTATION = re.compile(r"= aten\.(slice|neg|cat|div|pow|arange\.start_step)\b")
"""Operators of the rotary embedding that say nothing here."""


@dataclass
class Recorder:
    """A lowering that interprets programs, and keeps what it saw of their last call.

    Attributes:
        sizes: per program, the name of each operator's node, and the sizes of its result.
        inputs: per program, the values of its placeholders by name.
    """

    sizes: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str = "eager"

    def lower(self, program: fx.GraphModule, *, name: str) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """See ``vlcache_fx.lowering.base.Lowering``."""

        def run(args: Sequence[Any]) -> tuple[Any, ...]:
            self.sizes[name], self.inputs[name] = {}, {}
            interpreter = _Interpreter(program, self.sizes[name], self.inputs[name])
            with torch.no_grad():
                return tuple(interpreter.run(*args))

        return run


class _Interpreter(fx.Interpreter):
    def __init__(self, program: fx.GraphModule, sizes: dict[str, Any], inputs: dict[str, Any]) -> None:
        super().__init__(program)
        self.sizes, self.inputs = sizes, inputs

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder":
            self.inputs[n.name] = result
        elif n.op == "call_function" and isinstance(result, Tensor):
            self.sizes[n.name] = (_operator(n), tuple(result.shape))
        return result


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def listing(graph: fx.Graph, names: Mapping[str, str], last: str) -> list[str]:
    """The nodes down to the one named ``last``, one a line; of the inputs, those that passes added.

    An empty name stands for the whole graph.
    """
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.name not in names:
            lines.append(f"{node.name} = input")
        elif node.op == "call_function":
            args = ", ".join(_shown(arg, names) for arg in node.args)
            lines.append(f"{node.name} = {_operator(node)}({args})")
        if node.name == last:
            break
    return lines


def _shown(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shown(one, names) for one in value)}]"
    if isinstance(value, fx.Node):
        return names.get(value.name, value.name)
    return "end" if value == 2**63 - 1 else str(value)


def changes(before: Sequence[str], after: Sequence[str]) -> str:
    """A diff without context."""
    lines = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


def graph_sections() -> dict[str, str]:
    """The captured graph, and what each pass changes in it; layer 0 alone."""
    captured, traced = captured_graph(tiny_vlm(**SHAPE), FIRST, SECOND, dynamic=True)
    given = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    names = {
        node.name: "num_tokens" if kind is InputKind.SIZE else _input_name(str(source.target))
        for node, source, kind in zip(captured.placeholders, given, captured.kinds, strict=True)
    }
    last = "add_3"  # layer 0's second addition to the residual stream
    shown = [line for line in listing(captured.graph_module.graph, names, last) if not ROTATION.search(line)]
    sections = {"captured": "\n".join(shown)}
    before = warm_program(captured, Pipeline(())).graph
    for count, step in enumerate(WARM.passes, 1):
        after = warm_program(captured, Pipeline(WARM.passes[:count])).graph
        to = "" if step.name == "trim_tail" else last  # that pass changes the end of the graph
        sections[step.name] = changes(listing(before, names, to), listing(after, names, to))
        before = after
    lines = sections["kv_only_rows"].splitlines()
    sections["kv_only_rows"] = "\n".join([*lines[:3], " ...", *lines[-3:]])
    return sections


def _input_name(source: str) -> str:
    for part in ("L_self_modules_", "L_", "modules_", "parameters_"):
        source = source.replace(part, "")
    return source.strip("_")


def two_requests() -> tuple[Any, Recorder, dict[str, Any], dict[str, Any]]:
    """The model, what was recorded of both calls, and the report of each."""
    model = vlcache_fx.compile(tiny_vlm(**SHAPE), lowering="eager", dynamic=True, budget=BUDGET)
    model.vlcache.lowering = recorder = Recorder()
    reports = []
    with torch.no_grad():
        for prompt in (FIRST, SECOND):
            model(**prompt)
            reports.append(model.vlcache.last_report)
    return model, recorder, reports[0], reports[1]


def request_sections(recorder: Recorder, cold: dict[str, Any], warm: dict[str, Any]) -> dict[str, str]:
    """What the runtime gave to the warm program, and the two reports."""
    inputs = recorder.inputs["warm"]
    slots = [name for name in inputs if name.startswith(("rows_", "keep_", "source_", "donor_", "results"))]
    lines = []
    for name in slots:
        value = inputs[name]
        shown = list(value.shape) if name.startswith("donor") else _row(value.tolist())
        lines.append(f"{name:<10} {'sizes ' if name.startswith('donor') else ''}{shown}")
    return {"bound": "\n".join(lines), "cold report": _report(cold), "warm report": _report(warm)}


def _row(values: list[int]) -> str:
    return "[" + " ".join(map(str, values)) + "]"


def _report(report: dict[str, Any]) -> str:
    left_out = (
        "timings_ms",
        "model_fingerprint",
        "spans",
        "shadow_kl",
        "explanations",
        "num_samples",
        "samples",
    )
    lines = [f"{name:<21} {_plain(value)}" for name, value in report.items() if name not in left_out]
    for span in report["spans"]:
        kept = {name: _plain(value) for name, value in span.items() if name != "key"}
        lines.append(f"{'span':<21} {', '.join(f'{name}={value}' for name, value in kept.items())}")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return str(value) if value is not None and isinstance(value, str) else value


def tokens_of(sizes: tuple[int, ...], num_tokens: int, counts: Sequence[int]) -> int | None:
    """How many tokens a result has: all of them, one of ``counts``, or None where it has none."""
    return next((count for count in (num_tokens, *counts) if count in sizes), None)


def draw(recorder: Recorder, warm: dict[str, Any], output: Path) -> None:
    """Tokens per operator of the cold and the warm program of the second prompt."""
    num_tokens, active = warm["num_tokens"], warm["rows_per_layer"]
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "vlcache_fx", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(
        2, 1, figsize=(9.2, 4.2), layout="constrained", facecolor="white", sharex=True
    )
    titles = {"cold": "Cold program, on 25 tokens", "warm": "Warm program, on 30 tokens"}
    for part, (name, title) in zip(axes, titles.items(), strict=True):
        total = num_tokens if name == "warm" else 25
        wanted = active if name == "warm" else (2,)
        bars = [
            (operator, tokens_of(sizes, total, wanted)) for operator, sizes in recorder.sizes[name].values()
        ]
        shown = [(operator, count) for operator, count in bars if count is not None and count > 1]
        colours = [_colour(operator, count == total) for operator, count in shown]
        part.bar(range(len(shown)), [count for _, count in shown], color=colours, width=0.8)
        part.set_title(f"{title}: tokens in the result of each operator, in order", loc="left", fontsize=9)
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes[0].legend(handles, COLOURS, ncols=4, loc="upper right", frameon=False, bbox_to_anchor=(1, 1.32))
    axes[1].set_xlabel("operators that have a dimension of tokens")
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


COLOURS = {"attention": "#b23a48", "splice": "#2f80c2", "all tokens": "#8a8f98", "active rows": "#e07b39"}


def _colour(operator: str, is_whole: bool) -> str:
    if "attention" in operator:
        return COLOURS["attention"]
    if "splice" in operator:
        return COLOURS["splice"]
    return COLOURS["all tokens" if is_whole else "active rows"]


def write_sections(page: Path, sections: Mapping[str, str]) -> str:
    """The page's text with each ``<!-- NAME: begin -->`` place filled that ``sections`` knows."""
    text = page.read_text(encoding="utf-8")
    for name, content in sections.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        old, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no line {end!r}")
        language = old.partition("```")[2].partition("\n")[0]
        text = f"{before}{begin}\n```{language}\n{content}\n```\n{end}{after}"
    return text


PAGES = ("life-of-a-graph.md", "life-of-a-request.md")


def all_sections() -> tuple[dict[str, str], Recorder, dict[str, Any]]:
    """The content of every place in the pages; and what the picture is drawn from."""
    _, recorder, cold, warm = two_requests()
    return {**graph_sections(), **request_sections(recorder, cold, warm)}, recorder, warm


def main() -> None:
    """Fill the pages and draw."""
    sections, recorder, warm = all_sections()
    for name in PAGES:
        (DOCS / name).write_text(write_sections(DOCS / name, sections), encoding="utf-8")
    draw(recorder, warm, Path(__file__).parent / "tokens.svg")
    print(f"filled {', '.join(PAGES)}; wrote tokens.svg")


if __name__ == "__main__":
    main()
