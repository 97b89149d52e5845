"""``Pipeline``: order, checks, dead code and dumps; fingerprints of users' passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx

from vlcache_fx.errors import LoweringError, PassError, Reason, UnsupportedGraphError
from vlcache_fx.lowering.fingerprint import structure_of
from vlcache_fx.lowering.outline import outline
from vlcache_fx.lowering.values import program_values
from vlcache_fx.passes import Pass, Pipeline, Program
from vlcache_fx.passes.standard import CLEANUP, COLD, DECODE_STEP, WARM, warm_program
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
            program.graph.call_function(torch.neg, (output.args[0],))  # without readers
        return True


@dataclass(frozen=True)
class Failing(Pass):
    name: ClassVar[str] = "failing"
    action: Callable[[Program], object] = field(default=lambda program: 1 / 0)

    def run(self, program: Program) -> bool:
        self.action(program)
        return True


def test_run_records_and_dead_code(tmp_path: Path) -> None:
    subject = program()
    records = Pipeline((First(), Second()), "mine", tmp_path).run(subject)
    assert [(record.name, record.changed) for record in records] == [("first", False), ("second", True)]
    assert [record.nodes_before for record in records] == [3, 3]
    assert all(record.elapsed_ms >= 0 for record in records)
    assert "neg" not in str(subject.graph)
    dumped = sorted(tmp_path.rglob("*.py"))
    assert [str(path.relative_to(tmp_path)) for path in dumped] == [
        "0000_mine/00_before.py",
        "0000_mine/02_second.py",
    ]  # only after a change
    assert "neg" not in dumped[1].read_text(encoding="utf-8")
    assert subject.graph_module(torch.ones(1)).item() == 2
    assert subject.properties == {"prepared"}


def test_run_missing_property() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((Failing(action=lambda program: None), Second())).run(program())
    assert error.value.pass_name == "second"
    assert error.value.passes_before == ("failing",)
    assert "requires prepared, which no earlier pass ensures" in str(error.value)


def test_run_failing_pass() -> None:
    with pytest.raises(PassError) as error:
        Pipeline((First(), Second(), Failing())).run(program())
    assert error.value.pass_name == "failing"
    assert error.value.passes_before == ("first", "second")
    assert str(error.value) == (
        "pass 'failing': ZeroDivisionError: division by zero (it ran after: first, second)."
    )
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_run_malformed_graph() -> None:
    def read_before_made(program: Program) -> None:
        mul = next(node for node in program.graph.nodes if node.op == "call_function")
        with program.graph.inserting_after(mul):
            late = program.graph.call_function(torch.neg, (mul.args[0],))
        mul.args = (late, 2)

    with pytest.raises(PassError, match=r"'failing'.*was used before it has been defined") as error:
        Pipeline((First(), Failing(action=read_before_made))).run(program())
    assert error.value.passes_before == ("first",)


def test_run_refusal() -> None:
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
    with pytest.raises(PassError, match="no pass is named 'third'; the passes are: first, second"):
        pipeline.inserting(mine, before="third")


@dataclass(frozen=True)
class ScaleStored(Pass):
    """A user's pass that scales donors."""

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


def test_inserting_user_pass() -> None:
    captured, graph, want = small()
    pipeline = WARM.inserting(ScaleStored(0.5), after="hoist_lookups")
    subject = warm_program(captured, pipeline)
    assert str(subject.graph).count("0.5") == 2
    results = run(subject, graph.calls[0], everything(captured), nothing_stored(subject))
    torch.testing.assert_close(results[0], want, atol=1e-5, rtol=1e-5)


def test_inserting_user_pass_in_wrong_order() -> None:
    with pytest.raises(PassError, match=r"'scale_stored': requires hoisted.*insert_lookups, splice_rows"):
        warm_program(small()[0], WARM.inserting(ScaleStored(0.5), before="hoist_lookups"))


def moved(pipeline: Pipeline, name: str, before: str) -> Pipeline:
    """Return a pipeline in another order."""
    step = next(step for step in pipeline.passes if step.name == name)
    others = replace(pipeline, passes=tuple(one for one in pipeline.passes if one is not step))
    return others.inserting(step, before=before)


@pytest.mark.parametrize(
    ("name", "before", "message"),
    [
        ("splice_rows", "insert_lookups", "'splice_rows': requires lookups"),
        ("hoist_lookups", "splice_rows", "'hoist_lookups': requires spliced"),
        ("record_donors", "splice_rows", r"'splice_rows': must run before record_donors \(recorded\)"),
        ("restrict_rows", "insert_lookups", "'insert_lookups': must run before restrict_rows"),
        ("restrict_rows", "splice_rows", r"'splice_rows': must run before restrict_rows \(rows_restricted\)"),
        ("restrict_rows", "record_donors", "'record_donors': must run before restrict_rows"),
        ("restrict_rows", "hoist_lookups", "'hoist_lookups': must run before restrict_rows"),
        ("restrict_merge", "restrict_rows", "'restrict_merge': requires rows_restricted"),
        ("kv_only_rows", "restrict_rows", "'kv_only_rows': requires rows_restricted"),
        ("trim_tail", "restrict_rows", "'trim_tail': requires rows_restricted"),
        ("gather_cross_layer_values", "kv_only_rows", "'gather_cross_layer_values': requires kv_only"),
        ("restrict_masks", "kv_only_rows", "'restrict_masks': requires kv_only"),
        ("tag_segments", "write_in_place", r"'write_in_place': must run before tag_segments \(segments\)"),
        ("tag_segments", "insert_lookups", "'insert_lookups': must run before tag_segments"),
    ],
)
def test_run_in_a_wrong_order(name: str, before: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        warm_program(small()[0], moved(WARM, name, before))


def test_run_cleanup_in_a_wrong_order() -> None:
    with pytest.raises(PassError, match="'fold_repeated_heads': requires attention_fused"):
        moved(CLEANUP, "fold_repeated_heads", "fuse_attention").run(program())


def without(pipeline: Pipeline, name: str) -> Pipeline:
    return replace(pipeline, passes=tuple(step for step in pipeline.passes if step.name != name))


@pytest.mark.parametrize(
    ("name", "missing"),
    [("tag_segments", "segments"), ("declare_inputs", "inputs_declared"), ("hoist_lookups", "hoisted")],
)
def test_check_complete_names_missing_properties(name: str, missing: str) -> None:
    subject = warm_program(small()[0], without(WARM, "declare_inputs"))
    assert name in [step.name for step in WARM.passes]
    subject.properties |= {"inputs_declared"}
    subject.check_complete()
    subject.properties -= {missing}
    with pytest.raises(LoweringError, match=f"no pass of the program ensures {missing}"):
        subject.check_complete()


def test_standard_passes_use_every_property() -> None:
    """Every declared property is required or excluded somewhere."""
    passes = [step for pipeline in (CLEANUP, COLD, WARM, DECODE_STEP) for step in pipeline.passes]
    asked = frozenset().union(*(step.requires | step.excludes for step in passes))
    ensured = frozenset().union(*(step.ensures for step in passes))
    assert asked - {"facts"} <= ensured
    assert ensured - asked == {"hoisted", "inputs_declared"}  # see Program.check_complete


def test_fingerprint_covers_code_and_configuration() -> None:
    def other_version() -> Pass:
        class ScaleStored(Pass):
            name: ClassVar[str] = "scale_stored"

            def run(self, program: Program) -> bool:
                return bool(program) and False

        return ScaleStored()

    one = ScaleStored(0.5).fingerprint()
    assert one == ScaleStored(0.5).fingerprint()
    assert len({one, ScaleStored(0.25).fingerprint(), other_version().fingerprint()}) == 3


def test_fingerprint_without_source() -> None:
    scope: dict[str, Any] = {"Pass": Pass}
    exec("class Typed(Pass):\n    name = 'typed'\n    def run(self, program): return False", scope)
    assert scope["Typed"]().fingerprint()


def test_structure_key_covers_inserted_nodes() -> None:
    """Keys contain the text of a segment's graph, so they cover inserted nodes."""

    def keys(pipeline: Pipeline) -> list[str]:
        program = warm_program(small(num_layers=2)[0], pipeline).graph_module
        values = program_values(program)
        return [structure_of(segment, values).key for segment in outline(program, values)]

    plain, half, quarter = (
        keys(pipeline)
        for pipeline in (WARM, *(WARM.inserting(ScaleStored(x), after="hoist_lookups") for x in (0.5, 0.25)))
    )
    assert plain == keys(WARM)
    assert plain != half
    assert half != quarter


@pytest.mark.parametrize("pipeline", [CLEANUP, COLD, WARM])
def test_standard_passes_in_files_of_their_name(pipeline: Pipeline) -> None:
    for step in pipeline.passes:
        assert type(step).__module__.rpartition(".")[2] == step.name
