import json

from vlcache_fx.bench.stress.result import StressResult, markdown, rows, table

ANSWER = {"event": "answer", "mode": "warm", "compared": True, "difference": 1e-7, "seconds": 0.25}


def test_result_counts_events() -> None:
    result = StressResult()
    result.add(ANSWER)
    result.add(ANSWER | {"mode": "cold", "compared": False, "difference": 0.0})
    result.add({"event": "fault", "fault": "timeout"})
    result.add({"event": "folder", "used": 12})
    assert (result.requests, result.compared, result.reuse_share) == (2, 1, 0.5)
    assert (result.largest_difference, result.slowest_s) == (1e-7, 0.25)
    assert (result.faults["timeout"], result.bound_samples, result.largest_folder_bytes) == (1, 1, 12)
    assert result.is_clean


def test_result_is_not_clean() -> None:
    problems = [
        ANSWER | {"wrong": "logits differ"},
        {"event": "failure", "error": "ValueError"},
        {"event": "bound", "tier": "file", "used": 3, "capacity": 2},
    ]
    for problem in problems:
        result = StressResult()
        result.add(problem)
        assert not result.is_clean
        assert len(result.problems) == 1


def test_result_as_data_and_tables() -> None:
    result = StressResult(processes=2, threads=4)
    result.add(ANSWER)
    assert json.loads(json.dumps(result.as_dict()))["reuse_share"] == 1.0
    assert table(result).row_count == len(list(rows(result)))
    assert "| wrong answers | 0 |" in markdown(result)
