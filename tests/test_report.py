"""What a person sees, on a terminal and without one."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from gptj_stream.report import ConsoleReport, Report, duration, gib


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(log: io.StringIO) -> ConsoleReport:
    return ConsoleReport(Console(file=log, force_terminal=False, width=40, highlight=False))


def test_without_a_terminal_a_line_every_so_many_steps(plain: ConsoleReport, log: io.StringIO) -> None:
    with plain.bar("train", 25, steps=True, every=10) as advance:
        for step in range(1, 26):
            advance(step, f"loss {step}")
    lines = log.getvalue().splitlines()
    assert lines == [
        "train 10/25  loss 10  0:00 left",
        "train 20/25  loss 20  0:00 left",
        "train 25/25  loss 25",
    ]
    assert not any(character in log.getvalue() for character in "\r\x1b")  # nothing that only a terminal understands


def test_without_a_terminal_a_line_every_ten_seconds(
    plain: ConsoleReport, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with plain.bar("tokenize", 1.0) as advance:
        for percent in range(0, 101, 5):  # four seconds each
            advance(percent / 100, "")
            now += 4
    assert [line.split("  ")[0] for line in log.getvalue().splitlines()] == [
        f"tokenize {percent}%" for percent in (15, 30, 45, 60, 75, 90)
    ]


@pytest.mark.parametrize("first", [1, 501])
def test_time_left_counts_from_the_first_step_seen(
    plain: ConsoleReport, log: io.StringIO, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """A slow start, or the steps before a resume, do not change the speed."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with plain.bar("train", first + 100, steps=True, every=1) as advance:
        now += 1000
        for step in range(first, first + 3):
            advance(step, "")
            now += 3
    total = first + 100
    assert log.getvalue().splitlines() == [
        f"train {first}/{total}",
        f"train {first + 1}/{total}  4:57 left",
        f"train {first + 2}/{total}  4:54 left",
    ]


def test_notes_are_one_plain_line(plain: ConsoleReport, log: io.StringIO) -> None:
    note = "a note of [bold]more[/bold] than forty columns, with a path /a/b/c [1] and :smile:"
    plain.note(note)
    assert log.getvalue() == note + "\n"


def test_a_terminal_gets_a_bar_with_time_left(log: io.StringIO) -> None:
    report = ConsoleReport(Console(file=log, force_terminal=True, width=120, highlight=False))
    with report.bar("train [b]", 4, steps=True) as advance:
        for step in range(1, 5):
            advance(step, f"loss {step}")
        report.note("a note above the bar")
    shown = log.getvalue()
    assert "\x1b[" in shown
    assert "train [b]" in shown  # a name, not markup
    assert "4/4" in shown
    assert "loss 4" in shown
    assert "a note above the bar" in shown
    assert "left" in shown


def test_the_default_report_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.note("nothing")
    with report.bar("train", 2, steps=True, every=1) as advance:
        advance(1, "nothing")
        advance(2, "nothing")
    assert capfd.readouterr() == ("", "")


def test_a_report_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReport().note("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_durations_and_sizes() -> None:
    seconds = (0, 59.4, 59.6, 3599, 3600, 90061, float("inf"), float("nan"))
    assert [duration(value) for value in seconds] == [
        "0:00", "0:59", "1:00", "59:59", "1:00:00", "25:01:01", "?", "?",
    ]  # fmt: skip
    assert gib(3 * 2**29) == "1.5 GiB"
