"""Tensors in files: what a header says of them, and their values, read a bounded piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptj_stream.errors import UserError

PIECE_BYTES = 32 << 20
"""What is read at once, where a format does not say otherwise."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose values are still in its file.

    Attributes:
        file: for messages, and for what a checkpoint is made of.
        dtype: of the stored values; one that is not floating point is not read.
        read_rows: (start, stop) -> those rows, (stop - start, ...), in `dtype` or a wider one. Rows are the first
            dimension; a tensor without dimensions is one row, (1,).
        rows_at_once: what `read_rows` is best called with multiples of; 0 where it does not matter.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    rows_at_once: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    def steps(self) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the tensor in order, in pieces of a size to hold in memory."""
        if not self.numel:
            return
        row_bytes = max(1, self.nbytes // self.rows)
        step = self.rows_at_once or max(1, PIECE_BYTES // row_bytes)
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


def parts_of(rows: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Of a tensor in parts of `rows` rows: the parts that start:stop lies in, each with its own first and last row."""
    for part in range(start // rows, -(-stop // rows)):
        yield part, max(start - part * rows, 0), min(stop - part * rows, rows)


def read_exactly(path: Path, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    """`numel` values from byte `offset` of a file, (numel,).

    Raises:
        UserError: the file ends before.
    """
    values = torch.empty(numel, dtype=dtype)
    target = values.view(torch.uint8).numpy().data
    done = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(target):
            read = file.readinto(target[done:])
            if not read:
                raise UserError(f"{path}: the file ends in the middle of its data; fetch it again")
            done += read
    return values
