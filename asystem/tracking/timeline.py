"""What every worker did when: a trace for Perfetto (ui.perfetto.dev) or chrome://tracing, and how much overlapped."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

from asystem.types import CallRecord

MAX_EVENTS = 100_000  # of each kind; the newest are kept: calls are about 15 MB of JSON then

# The methods whose overlap the design is about; everything else (weights, checkpoints) counts for its group only.
ROLES = {"decode": "generation", "update": "training", "score": "reward"}
BEFORE_RL = ("setup", "warm_up")

Intervals = list[tuple[float, float]]


class Timeline:
    """Collects calls, instants and counters, bounded in number."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self.calls: deque[CallRecord] = deque(maxlen=max_events)
        self._instants: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=max_events)
        self._counts: deque[tuple[float, str, float]] = deque(maxlen=max_events)
        self._seen = 0

    def add(self, record: CallRecord) -> None:
        """Adds a call; one that its process did not live to time (start 0) has no place in a timeline."""
        if record.start > 0:
            self._seen += 1
            self.calls.append(record)

    def mark(self, time: float, name: str, fields: dict[str, Any]) -> None:
        """Adds an instant of the controller; ``time`` in seconds since the epoch."""
        self._instants.append((time, name, fields))

    def count(self, time: float, name: str, value: float) -> None:
        """Adds a point of the curve ``name``, which a viewer draws above the workers."""
        self._counts.append((time, name, value))

    def trace(self) -> dict[str, Any]:
        """The trace: a process for each group, a thread for each rank, times in µs since the first event."""
        points = [event[0] for event in (*self._instants, *self._counts)]
        zero = min((*(call.start for call in self.calls), *points), default=0.0)
        groups = {group: pid for pid, group in enumerate(sorted({call.group for call in self.calls}), start=1)}
        events = [_named("process_name", 0, 0, "controller")]
        events += [_named("process_name", pid, 0, group) for group, pid in groups.items()]
        ranks = sorted({(call.group, call.rank, call.host) for call in self.calls})
        events += [_named("thread_name", groups[group], rank, f"rank {rank} on {host}") for group, rank, host in ranks]
        events += [_complete(call, groups[call.group], zero) for call in self.calls]
        events += [
            {"name": name, "ph": "i", "s": "g", "ts": _micros(time - zero), "pid": 0, "tid": 0, "args": fields}
            for time, name, fields in self._instants
        ]
        events += [
            {"name": name, "ph": "C", "ts": _micros(time - zero), "pid": 0, "args": {"value": value}}
            for time, name, value in self._counts
        ]
        dropped = self._seen - len(self.calls)
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"started": zero, "calls_kept": len(self.calls), "calls_dropped_oldest": dropped},
        }


def overlap(records: Iterable[CallRecord]) -> dict[str, Any]:
    """How busy groups were, and how much of generation, training and reward ran at the same time.

    A group is busy while any of its ranks is in a call. Starting and the supervised warm-up are left out.

    Returns:
        seconds: from the first call to the end of the last. busy_seconds, idle_share: by group. both_busy_seconds: by
        pair of groups, "a+b". generation_training, generation_reward, training_reward: the time in which both ran, as
        a share of the busy time of the shorter one; None where one of them never ran.
    """
    calls = [record for record in records if record.start > 0 and record.method not in BEFORE_RL]
    span = max((call.end for call in calls), default=0.0) - min((call.start for call in calls), default=0.0)
    groups = _merged((call.group, call) for call in calls)
    roles = _merged((ROLES[call.method], call) for call in calls if call.method in ROLES)
    result: dict[str, Any] = {
        "seconds": span,
        "busy_seconds": {name: _length(intervals) for name, intervals in groups.items()},
        "idle_share": {name: 1 - _length(intervals) / span if span else 0.0 for name, intervals in groups.items()},
        "both_busy_seconds": {
            f"{a}+{b}": _length(intersect(groups[a], groups[b])) for a, b in itertools.combinations(groups, 2)
        },
    }
    for a, b in itertools.combinations(ROLES.values(), 2):
        result[f"{a}_{b}"] = _share(roles.get(a, []), roles.get(b, []))
    return result


def merge(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """The union of intervals: sorted, disjoint."""
    result: Intervals = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """What lies in both of two merged lists."""
    result: Intervals = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            result.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return result


def _merged(named: Iterable[tuple[str, CallRecord]]) -> dict[str, Intervals]:
    intervals: dict[str, Intervals] = {}
    for name, call in named:
        intervals.setdefault(name, []).append((call.start, call.end))
    return {name: merge(intervals[name]) for name in sorted(intervals)}


def _length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)


def _share(a: Intervals, b: Intervals) -> float | None:
    shorter = min(_length(a), _length(b))
    return _length(intersect(a, b)) / shorter if shorter > 0 else None


def _complete(call: CallRecord, pid: int, zero: float) -> dict[str, Any]:
    return {
        "name": call.method,
        "cat": call.group,
        "ph": "X",
        "ts": _micros(call.start - zero),
        "dur": _micros(call.end - call.start),
        "pid": pid,
        "tid": call.rank,
        "args": {"queue_seconds": round(call.queue_seconds, 6)},
    }


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _micros(seconds: float) -> float:
    return round(seconds * 1e6, 1)
