"""Seconds by lane, and the file that trace viewers read."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gptj_stream.trace import Trace


class Clock:
    """Nanoseconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", clock)
    return clock


def written(trace: Trace, path: Path) -> tuple[dict[int, str], list[dict[str, Any]], dict[str, Any]]:
    """The file's rows, by thread; its spans; the whole."""
    trace.write(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    events = content["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return rows, [event for event in events if event["ph"] == "X"], content


def test_seconds_add_up_by_lane_and_name_until_reset(clock: Clock) -> None:
    trace = Trace()
    for layer in range(3):
        with trace.span("compute", "wait", layer=layer):
            clock.sleep(1)
        with trace.span("compute", "forward", layer=layer):
            clock.sleep(2)
    assert trace.seconds("compute") == 9
    assert trace.seconds("compute", "wait") == 3
    assert trace.seconds("read") == 0
    trace.reset()
    assert trace.seconds("compute") == 0


def test_nested_spans_of_a_lane_count_once(clock: Clock) -> None:
    trace = Trace()
    with trace.span("compute", "step"):
        for name in ("forward", "backward"):
            clock.sleep(1)
            with trace.span("compute", name):
                clock.sleep(10)
                with trace.span("compute", "wait"), trace.span("read", "weights"):
                    clock.sleep(100)
    assert {name: trace.seconds("compute", name) for name in ("step", "forward", "backward", "wait")} == {
        "step": 2,
        "forward": 10,
        "backward": 10,
        "wait": 200,
    }
    assert trace.seconds("compute") == 222
    assert trace.seconds("read") == 200


def test_a_span_that_fails_counts(clock: Clock) -> None:
    trace = Trace(events=True)
    with pytest.raises(OSError, match="full"), trace.span("write", "state"):
        clock.sleep(1)
        raise OSError("full")
    assert trace.seconds("write") == 1


def test_the_file_says_what_happened_when(clock: Clock, tmp_path: Path) -> None:
    trace = Trace(events=True)
    clock.sleep(1)
    with trace.span("step", "step", step=7):
        with trace.span("read", "weights", layer=0):
            clock.sleep(0.5e-3)
        with trace.span("compute", "forward", layer=0):
            clock.sleep(0.25e-3)
    rows, spans, content = written(trace, tmp_path / "trace.json")
    assert list(rows.values()) == ["step", "compute", "read"]
    assert [(rows[e["tid"]], e["name"], e["ts"], e["dur"], e["args"]) for e in spans] == [
        ("read", "weights", 1e6, 500, {"layer": 0}),
        ("compute", "forward", 1e6 + 500, 250, {"layer": 0}),
        ("step", "step", 1e6, 750, {"step": 7}),
    ]
    assert content["otherData"] == {"left_out": 0}
    # what the format asks of every event
    assert all({"ph", "name", "pid", "tid"} <= event.keys() for event in content["traceEvents"])


def test_each_thread_of_a_lane_has_its_row(tmp_path: Path) -> None:
    """Four threads inside a span of one lane at the same time, another lane apart."""
    trace, together = Trace(events=True), threading.Barrier(4)

    def read(layer: int) -> None:
        with trace.span("read", "weights", layer=layer):
            together.wait(timeout=30)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    with trace.span("compute", "forward"):
        pass
    rows, spans, _ = written(trace, tmp_path / "trace.json")
    assert list(rows.values()) == ["compute", "read", "read 2", "read 3", "read 4"]
    assert len({event["tid"] for event in spans}) == 5
    reads = [event for event in spans if event["cat"] == "read"]
    assert max(event["ts"] for event in reads) <= min(event["ts"] + event["dur"] for event in reads)


def test_threads_lose_no_span() -> None:
    trace = Trace(events=True)

    def work(_: int) -> None:
        for _ in range(500):
            with trace.span("update", "layer"):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(trace._events) == 4000
    assert trace.seconds("update") == pytest.approx(sum(event.duration for event in trace._events) / 1e9)


@pytest.mark.parametrize(("options", "kept"), [({}, 0), ({"events": True, "limit": 3}, 3)])
def test_events_are_bounded(clock: Clock, tmp_path: Path, options: dict[str, Any], kept: int) -> None:
    """The first events are kept, and the file says how many are missing. The seconds go on."""
    trace = Trace(**options)
    for step in range(10):
        with trace.span("step", "step", step=step):
            clock.sleep(1)
    _, spans, content = written(trace, tmp_path / "trace.json")
    assert [event["args"]["step"] for event in spans] == list(range(kept))
    assert content["otherData"]["left_out"] == (7 if kept else 0)
    assert trace.seconds("step") == 10
