"""What a person sees while a job runs: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[float, str], None]
"""(how much is done, what to say of it)."""


class Report:
    """The silent report: what library calls use unless they are given another."""

    def note(self, text: str) -> None:
        """Say one thing."""

    @contextmanager
    def bar(self, what: str, total: float, *, steps: bool = False, every: int = 0) -> Iterator[Advance]:
        """Follow something long.

        Args:
            what: its name.
            total: when it is done, in any unit.
            steps: `total` counts steps, worth showing as numbers.
            every: without a terminal, a line every so many units; 0 is a line every ten seconds.
        """
        yield lambda done, text: None


class ConsoleReport(Report):
    """Reports to a terminal or a log file (standard error, so that results on standard output stay clean)."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: float, *, steps: bool = False, every: int = 0) -> Iterator[Advance]:
        if not self._console.is_terminal:
            yield self._lines(what, total, steps, every)
            return
        count: ProgressColumn = MofNCompleteColumn() if steps else TaskProgressColumn()
        columns = (
            TextColumn("{task.description}", markup=False),
            count,
            BarColumn(bar_width=16),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=not steps) as progress:
            task = progress.add_task(what, total=total, text="")
            yield lambda done, text: progress.update(task, completed=done, text=text)

    def _lines(self, what: str, total: float, steps: bool, every: int) -> Advance:
        start = last = time.monotonic()
        first: float | None = None
        shown = 0.0

        def advance(done: float, text: str) -> None:
            nonlocal start, last, first, shown
            now = time.monotonic()
            if first is None:
                first, start = done, now  # a resumed job starts in the middle: its speed counts from there
            due = done - shown >= every or done >= total if every else now - last >= 10
            if done <= shown or not due:
                return
            last, shown = now, done
            count = f"{done:.0f}/{total:.0f}" if steps else f"{done / total:.0%}"
            left = f"{duration((now - start) * (total - done) / (done - first))} left" if first < done < total else ""
            self.note("  ".join(filter(None, (f"{what} {count}", text, left))))

        return advance


def duration(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    if not seconds < float("inf"):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
