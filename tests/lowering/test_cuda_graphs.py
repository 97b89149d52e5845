"""``CudaGraphs`` with a fake recorder, and on a GPU with the real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.lowering import PendingTensor
from vlcache_fx.lowering.cuda_graphs import COPIED_BYTES, CudaGraphs

LARGE = COPIED_BYTES // 4 + 1


class Recorder:
    """A fake of CUDA graphs: a replay reads the recorded buffers and overwrites the recorded results."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self.fails = False

    def __call__(self, run: Any, args: Sequence[Any]) -> tuple[Callable[[], object], tuple[Any, ...]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recordings += 1
        results = run(args)

        def replay() -> None:
            self.replays += 1
            for place, value in zip(results, run(args), strict=True):
                if isinstance(place, Tensor):
                    place.copy_(value)

        return replay, results


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def program(recorder: Recorder) -> CudaGraphs:
    return CudaGraphs(lambda args: (args[0] * args[1].sum(), args[2]), record=recorder, limit=2)


def call(program: CudaGraphs, small: Tensor, large: Tensor, number: int = 3) -> None:
    first, second = program([small, large, number])
    torch.testing.assert_close(first, small * large.sum())
    assert second == number


def test_record_after_repeated_sizes(program: CudaGraphs, recorder: Recorder) -> None:
    large = torch.ones(LARGE)
    for value in range(5):
        call(program, torch.full((4,), float(value)), large)
    assert (recorder.recordings, recorder.replays) == (1, 3)
    large += 1  # read from its own address
    call(program, torch.ones(4), large)
    assert recorder.replays == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda small, large: (torch.ones(5), large, 3),
        lambda small, large: (torch.ones(4).double(), large.double(), 3),
        lambda small, large: (torch.ones(8)[::2], large, 3),
        lambda small, large: (small, torch.ones(LARGE), 3),
        lambda small, large: (small, large, 4),
    ],
    ids=["size", "type", "stride", "address of what is large", "number"],
)
def test_record_per_layout(program: CudaGraphs, recorder: Recorder, change: Any) -> None:
    small, large = torch.ones(4), torch.ones(LARGE)
    for _ in range(3):
        call(program, small, large)
    call(program, *change(small, large))
    assert (recorder.recordings, recorder.replays) == (1, 1)


def test_replay_reads_weights_in_place(recorder: Recorder) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    program = CudaGraphs(lambda args: (args[0] * args[1],), record=recorder, after=1)
    with torch.no_grad():
        for value in range(3):
            weight.fill_(value)
            (got,) = program([torch.full((2,), 2.0), weight])
            assert got.tolist() == [2.0 * value] * 2
        (got,) = program([torch.ones(2), torch.nn.Parameter(torch.full((2,), 9.0))])
    assert got.tolist() == [9.0] * 2
    assert (recorder.recordings, recorder.replays) == (1, 2)


def test_replay_writes_inputs_in_place(recorder: Recorder) -> None:
    program = CudaGraphs(lambda args: (args[1].fill_(args[0].sum()) + 1, None), record=recorder, in_place=[1])
    cache = torch.zeros(2)
    for value in range(5):
        got, nothing = program([torch.full((2,), float(value)), cache])
        assert cache.tolist() == [2.0 * value] * 2
        assert got.tolist() == [2.0 * value + 1] * 2
        assert nothing is None
    assert (recorder.recordings, recorder.replays) == (1, 3)
    other = torch.zeros(2)
    program([torch.ones(2), other])
    assert other.tolist() == [2.0, 2.0]


def test_replay_returns_new_results(program: CudaGraphs) -> None:
    large = torch.ones(LARGE)
    kept = [program([torch.full((4,), float(value)), large, 3])[0] for value in range(5)]
    assert [int(one[0]) for one in kept] == [value * LARGE for value in range(5)]


def test_limit_drops_least_recently_used(program: CudaGraphs, recorder: Recorder) -> None:
    large = torch.ones(LARGE)
    for size in (2, 3, 4):
        for _ in range(3):
            call(program, torch.ones(size), large)
    assert recorder.recordings == 3
    call(program, torch.ones(4), large)
    assert recorder.replays == 4
    call(program, torch.ones(2), large)  # dropped: runs without a graph, and is counted from zero
    assert (recorder.recordings, recorder.replays) == (3, 4)


def test_record_failure_runs_program(
    program: CudaGraphs, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails = True
    for _ in range(5):
        call(program, torch.ones(4), torch.ones(4))
    assert recorder.recordings == 0
    assert caplog.text.count("recording failed") == 1


def test_pending_tensors_run_program(recorder: Recorder) -> None:
    program = CudaGraphs(lambda args: (args[0].get() + 1,), record=recorder)
    for _ in range(4):
        (got,) = program([PendingTensor(torch.zeros(1), lambda: None)])
        assert got.item() == 1
    assert recorder.recordings == 0


@pytest.mark.gpu
def test_replay_equals_run_on_gpu() -> None:
    program = CudaGraphs(lambda args: (torch.relu(args[0] @ args[1]),))
    weight = torch.randn(1024, 1024, device="cuda")
    for seed in range(6):
        rows = torch.randn(32, 1024, generator=torch.Generator().manual_seed(seed)).cuda()
        (got,) = program([rows, weight])
        torch.testing.assert_close(got, torch.relu(rows @ weight))
    assert any(recording is not None for recording in program._recordings.values())
