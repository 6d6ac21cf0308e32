"""What happens when: seconds by lane for the metrics, and each span for a picture.

A lane is a logical row. Spans of several threads in one lane may overlap; each thread has a row of its own in the
file, which Perfetto (https://ui.perfetto.dev), chrome://tracing and `benchmarks/timeline.py` draw.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptj_stream.files import write_text

LANES = ("step", "data", "compute", "wait", "norm", "update", "to device", "from device", "read", "write")
"""The trainer's lanes from top to bottom. Others come below them, in the order in which they appear."""

_ROWS_PER_LANE = 1000


@dataclass
class _Row:
    """One thread's part of a lane.

    Attributes:
        number: which of the lane's threads it is, from 1 in the order of their first event; 0 before that.
        inner: nanoseconds of the spans that ended inside the one that is open.
    """

    lane: str
    number: int = 0
    inner: int = 0


class _Event(NamedTuple):
    row: _Row
    name: str
    start: int
    duration: int
    arguments: dict[str, int | float | str]

    def line(self, zero: int, thread: int) -> dict[str, Any]:
        """The event as the file has it, in microseconds since `zero`."""
        return {
            "ph": "X",
            "cat": self.row.lane,
            "name": self.name,
            "ts": (self.start - zero) / 1e3,
            "dur": self.duration / 1e3,
            "pid": 1,
            "tid": thread,
            "args": self.arguments,
        }


class Trace:
    """Records spans, from any thread. Times are the host's: of a kernel that CUDA runs later they see the launch.

    Args:
        events: keep each span for `write`; without, only the seconds are summed.
        limit: of events kept, the first ones: some 400 bytes each. Later spans still count in the seconds.
    """

    def __init__(self, *, events: bool = False, limit: int = 200_000) -> None:
        self._limit = limit if events else 0
        self._start = time.perf_counter_ns()
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._nanoseconds: dict[tuple[str, str], int] = {}
        self._events: list[_Event] = []
        self._left_out = 0
        self._rows: dict[str, int] = {}  # how many each lane has

    @contextmanager
    def span(self, lane: str, name: str, **arguments: int | float | str) -> Iterator[None]:
        """Time the block. Seconds are summed by `name`, so what differs from time to time belongs in `arguments`."""
        row = self._row(lane)
        outer, row.inner = row.inner, 0
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            duration = time.perf_counter_ns() - start
            own = duration - row.inner
            row.inner = outer + duration
            with self._lock:
                self._nanoseconds[lane, name] = self._nanoseconds.get((lane, name), 0) + own
                if len(self._events) < self._limit:
                    if not row.number:
                        row.number = self._rows[lane] = self._rows.get(lane, 0) + 1
                    self._events.append(_Event(row, name, start, duration, arguments))
                elif self._limit:
                    self._left_out += 1

    def seconds(self, lane: str, name: str | None = None) -> float:
        """Seconds of the lane's spans, or those of one name, that ended since the last `reset`.

        Where a thread nests spans in one lane, each moment counts once, for the innermost.
        """
        with self._lock:
            spans = self._nanoseconds.items()
            return sum(value for key, value in spans if key[0] == lane and name in (None, key[1])) / 1e9

    def reset(self) -> None:
        """Start the seconds again from 0; the events stay."""
        with self._lock:
            self._nanoseconds.clear()

    def write(self, path: Path) -> None:
        """Write the events so far in the Trace Event Format."""
        with self._lock:
            events, rows, left_out = list(self._events), dict(self._rows), self._left_out
        order = sorted(rows, key=lambda lane: LANES.index(lane) if lane in LANES else len(LANES))
        first = {lane: _ROWS_PER_LANE * place for place, lane in enumerate(order, 1)}
        lines = [_metadata("process_name", 0, name="gptj-stream")]
        for lane in order:
            for number in range(1, rows[lane] + 1):
                thread = first[lane] + number
                lines.append(_metadata("thread_name", thread, name=lane if number == 1 else f"{lane} {number}"))
                lines.append(_metadata("thread_sort_index", thread, sort_index=thread))
        lines += [event.line(self._start, first[event.row.lane] + event.row.number) for event in events]
        rest = {"displayTimeUnit": "ms", "otherData": {"left_out": left_out}}
        text = ",\n".join(json.dumps(line) for line in lines)  # a line an event: grep and diff can read it
        write_text(path, f'{{"traceEvents": [\n{text}\n], {json.dumps(rest)[1:]}\n')

    def _row(self, lane: str) -> _Row:
        rows: dict[str, _Row] = self._thread.__dict__
        if lane not in rows:
            rows[lane] = _Row(lane)
        return rows[lane]


def _metadata(kind: str, thread: int, **arguments: int | str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": 1, "tid": thread, "args": arguments}
