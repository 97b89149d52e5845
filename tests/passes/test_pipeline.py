"""What the pipeline owns: order, checks, dead code, dumps, fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor, fx

from vlcache_fx.errors import PassError, Reason, UnsupportedGraphError
from vlcache_fx.passes import Pass, Pipeline, Program
from vlcache_fx.passes.standard import CLEANUP, COLD, WARM, warm_program
from vlcache_fx.spec.slots import Donor

from .programs import everything, nothing_stored, run, small

aten = torch.ops.aten


def program() -> Program:
    def double(x: Tensor) -> Tensor:
        return x * 2

    return Program(fx.symbolic_trace(double))


@dataclass(frozen=True)
class First(Pass):
    name: ClassVar[str] = "first"
    ensures: ClassVar[frozenset[str]] = frozenset({"prepared"})

    def run(self, program: Program) -> bool:
        return False


@dataclass(frozen=True)
class Second(Pass):
    name: ClassVar[str] = "second"
    requires: ClassVar[frozenset[str]] = frozenset({"prepared"})

    def run(self, program: Program) -> bool:
        output = next(iter(reversed(program.graph.nodes)))
        with program.graph.inserting_before(output):
            program.graph.call_function(torch.neg, (output.args[0],))  # read by nothing
        return True


@dataclass(frozen=True)
class Failing(Pass):
    name: ClassVar[str] = "failing"
    action: Callable[[Program], object] = field(default=lambda program: 1 / 0)

    def run(self, program: Program) -> bool:
        self.action(program)
        return True


def test_records_and_dead_code() -> None:
    dumped: list[str] = []
    subject = program()
    records = Pipeline((First(), Second()), lambda name, text: dumped.append(f"{name}: {'neg' in text}")).run(
        subject
    )
    assert [(record.name, record.changed) for record in records] == [("first", False), ("second", True)]
    assert [record.nodes_before for record in records] == [3, 3]
    assert all(record.elapsed_ms >= 0 for record in records)
    assert "neg" not in str(subject.graph)
    assert dumped == ["second: False"]  # only where something changed
    assert subject.graph_module(torch.ones(1)).item() == 2
    assert subject.properties == {"prepared"}


def test_a_pass_without_what_it_requires_is_named() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((Failing(action=lambda program: None), Second())).run(program())
    assert error.value.pass_name == "second"
    assert error.value.passes_before == ("failing",)
    assert "requires prepared, which no earlier pass ensures" in str(error.value)


def test_a_failing_pass_names_itself_and_the_ones_before_it() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((First(), Second(), Failing())).run(program())
    assert error.value.pass_name == "failing"
    assert error.value.passes_before == ("first", "second")
    assert str(error.value) == (
        "pass 'failing': ZeroDivisionError: division by zero (it ran after: first, second)."
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_malformed_graph_fails_the_pass_that_made_it() -> None:
    def read_before_made(program: Program) -> None:
        mul = next(node for node in program.graph.nodes if node.op == "call_function")
        with program.graph.inserting_after(mul):
            late = program.graph.call_function(torch.neg, (mul.args[0],))
        mul.args = (late, 2)

    with pytest.raises(PassError, match=r"'failing'.*was used before it has been defined") as error:
        Pipeline((First(), Failing(action=read_before_made))).run(program())
    assert error.value.passes_before == ("first",)


def test_a_refusal_stays_a_refusal() -> None:
    def refuse(program: Program) -> None:
        raise UnsupportedGraphError(Reason.UNKNOWN_OP, "not this one")

    with pytest.raises(UnsupportedGraphError, match="not this one"):
        Pipeline((Failing(action=refuse),)).run(program())


def names(pipeline: Pipeline) -> list[str]:
    return [step.name for step in pipeline.passes]


def test_inserting_by_name() -> None:
    pipeline = Pipeline((First(), Second()))
    mine = Failing()
    assert names(pipeline.inserting(mine, before="second")) == ["first", "failing", "second"]
    assert names(pipeline.inserting(mine, after="second")) == ["first", "second", "failing"]
    assert names(pipeline.inserting(mine)) == ["first", "second", "failing"]
    assert names(pipeline) == ["first", "second"]
    with pytest.raises(PassError, match="no pass is named 'third'; there are first, second"):
        pipeline.inserting(mine, before="third")


@dataclass(frozen=True)
class ScaleStored(Pass):
    """A user's pass: donors are kept at another scale."""

    factor: float
    name: ClassVar[str] = "scale_stored"
    requires: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    def run(self, program: Program) -> bool:
        for slot, node in program.slots.items():
            if isinstance(slot, Donor):
                first = next(iter(node.users))
                with program.graph.inserting_before(first):
                    scaled = program.graph.call_function(aten.mul.Tensor, (node, self.factor))
                node.replace_all_uses_with(
                    scaled, delete_user_cb=lambda user, scaled=scaled: user is not scaled
                )
        return True


def test_a_user_pass_among_the_standard_ones() -> None:
    captured, graph, want = small()
    pipeline = WARM.inserting(ScaleStored(0.5), after="hoist_lookups")
    subject = warm_program(captured, pipeline)
    assert str(subject.graph).count("0.5") == 2
    results = run(subject, graph.calls[0], everything(captured), nothing_stored(subject))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


def test_a_user_pass_at_the_wrong_place_is_told_what_it_lacks() -> None:
    with pytest.raises(PassError, match=r"'scale_stored': requires hoisted.*insert_lookups, splice_rows"):
        warm_program(small()[0], WARM.inserting(ScaleStored(0.5), before="hoist_lookups"))


def test_fingerprints_tell_code_and_order() -> None:
    def other_version() -> type[Pass]:
        class First(Pass):
            name: ClassVar[str] = "first"

            def run(self, program: Program) -> bool:
                return bool(program) and False

        return First

    one, two = Pipeline((First(), Second())), Pipeline((Second(), First()))
    assert one.fingerprint() == Pipeline((First(), Second())).fingerprint()
    assert one.fingerprint() != two.fingerprint()
    assert one.fingerprint() != Pipeline((other_version()(), Second())).fingerprint()
    assert len({pipeline.fingerprint() for pipeline in (CLEANUP, COLD, WARM)}) == 3


@pytest.mark.parametrize("pipeline", [CLEANUP, COLD, WARM])
def test_every_standard_pass_lies_in_a_file_of_its_name(pipeline: Pipeline) -> None:
    for step in pipeline.passes:
        assert type(step).__module__.rpartition(".")[2] == step.name
