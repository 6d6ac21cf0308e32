"""A run's numbers, step by step, as JSONL and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from gptj_stream.files import write_text


class MetricsLog:
    """Appends to both logs. A resumed run first drops what lies behind the step it resumes from."""

    def __init__(self, jsonl: Path, tensorboard: Path, *, after_step: int) -> None:
        if jsonl.is_file():
            rows = [line for line in jsonl.read_text(encoding="utf-8").splitlines() if _step(line) <= after_step]
            write_text(jsonl, "".join(row + "\n" for row in rows))
        self._file = jsonl.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(tensorboard), purge_step=after_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._events.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short when the run was killed
        return float("inf")
