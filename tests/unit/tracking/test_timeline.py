"""The trace and the overlap, on intervals that a reader can check by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asystem.tracking import overlap
from asystem.tracking.timeline import Timeline, intersect, merge
from asystem.types import CallRecord


def call(group: str, method: str, start: float, end: float, rank: int = 0) -> CallRecord:
    return CallRecord(group, rank, method, start, end, host="here", queue_seconds=0.5)


CALLS = [
    call("trainers", "setup", 1, 90),  # starting and the warm-up stay out
    call("trainers", "warm_up", 90, 100),
    call("generators", "decode", 100, 104, rank=0),
    call("generators", "decode", 102, 108, rank=1),  # together busy from 100 to 108
    call("trainers", "update", 106, 110),
    call("rewarders", "score", 103, 104),
    call("rewarders", "score", 109, 110),
    call("generators", "load_weights", 110, 112),
]


def test_overlap_by_hand() -> None:
    measured = overlap(CALLS)
    assert measured["seconds"] == 12
    assert measured["busy_seconds"] == {"generators": 10, "rewarders": 2, "trainers": 4}
    assert measured["idle_share"] == pytest.approx({"generators": 2 / 12, "rewarders": 10 / 12, "trainers": 8 / 12})
    assert measured["both_busy_seconds"] == {
        "generators+rewarders": 1,
        "generators+trainers": 2,
        "rewarders+trainers": 1,
    }
    assert measured["generation_training"] == 2 / 4
    assert measured["generation_reward"] == 1 / 2
    assert measured["training_reward"] == 1 / 2


def test_one_group_that_does_both_overlaps_by_method() -> None:
    measured = overlap([call("hybrid", "decode", 10, 14), call("hybrid", "update", 13, 18)])
    assert measured["generation_training"] == 1 / 4
    assert measured["generation_reward"] is None
    assert measured["both_busy_seconds"] == {}


def test_nothing_happened() -> None:
    measured = overlap([])
    assert measured["seconds"] == 0 and measured["idle_share"] == {} and measured["generation_training"] is None


TENTHS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1])))


@given(TENTHS, TENTHS)
def test_intersections_agree_with_counting_units(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    def units(intervals: list[tuple[int, int]]) -> set[int]:
        return {unit for start, end in intervals for unit in range(start, end)}

    assert sum(end - start for start, end in merge(a)) == len(units(a))
    assert sum(end - start for start, end in intersect(merge(a), merge(b))) == len(units(a) & units(b))


def test_a_trace_has_a_process_for_each_group_and_a_thread_for_each_rank() -> None:
    timeline = Timeline()
    for record in CALLS[2:5]:
        timeline.add(record)
    timeline.mark(103.5, "weights", {"version": 2})
    timeline.count(104.0, "rollouts in flight", 64)
    events = timeline.trace()["traceEvents"]
    processes = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert processes == {"controller": 0, "generators": 1, "trainers": 2}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert threads == {(1, 0): "rank 0 on here", (1, 1): "rank 1 on here", (2, 0): "rank 0 on here"}
    complete = [event for event in events if event["ph"] == "X"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in complete] == [
        ("decode", 1, 0, 0.0, 4e6),
        ("decode", 1, 1, 2e6, 6e6),
        ("update", 2, 0, 6e6, 4e6),
    ]
    assert complete[0]["args"] == {"queue_seconds": 0.5}
    (instant,) = [event for event in events if event["ph"] == "i"]
    assert (instant["name"], instant["ts"], instant["args"]) == ("weights", 3.5e6, {"version": 2})
    (counter,) = [event for event in events if event["ph"] == "C"]
    assert (counter["name"], counter["ts"], counter["args"]) == ("rollouts in flight", 4e6, {"value": 64})


def test_a_long_run_keeps_its_newest_calls_and_says_so() -> None:
    timeline = Timeline(max_events=3)
    for index in range(10):
        timeline.add(call("generators", f"call{index}", 100 + index, 101 + index))
        timeline.mark(100 + index, f"mark{index}", {})
        timeline.count(100 + index, "reward/mean", index)
    trace = timeline.trace()
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"] == ["call7", "call8", "call9"]
    assert [e["name"] for e in trace["traceEvents"] if e["ph"] == "i"] == ["mark7", "mark8", "mark9"]
    assert [e["args"]["value"] for e in trace["traceEvents"] if e["ph"] == "C"] == [7, 8, 9]
    assert trace["otherData"] == {"started": 107, "calls_kept": 3, "calls_dropped_oldest": 7}


def test_a_call_that_its_process_did_not_survive_is_left_out() -> None:
    timeline = Timeline()
    timeline.add(call("generators", "decode", 0.0, 0.0))
    timeline.add(call("generators", "decode", 100.0, 101.0))
    assert [e["ts"] for e in timeline.trace()["traceEvents"] if e["ph"] == "X"] == [0.0]
