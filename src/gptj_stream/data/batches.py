"""From rows to the micro-batches of a step: order, position, restore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from gptj_stream.batch import IGNORE, MicroBatch
from gptj_stream.data.packing import Packing
from gptj_stream.data.tokens import TokenDataset


class Batches:
    """The training steps over a dataset's rows, without end or up to a number of rows.

    Each epoch visits every row once, in an order that follows from (seed, epoch) alone, so the position is one
    number. A step may cross from one epoch into the next.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        packing: Packing,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        rows: int | None = None,
    ) -> None:
        """Sizes are in rows; a step is `global_batch_size` rows in micro-batches of `micro_batch_size` or fewer.

        Training ends after `rows`, counted over all epochs: the last step takes what is left of them.
        """
        assert micro_batch_size >= 1
        assert global_batch_size >= 1
        self._dataset = dataset
        self._packing = packing
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._rows = rows
        self._consumed_rows = 0
        self._order_of: tuple[int, npt.NDArray[np.int64]] | None = None  # the epoch last asked for, and its order

    @property
    def rows_per_epoch(self) -> int:
        return self._packing.rows

    @property
    def epoch(self) -> float:
        """Epochs done so far, with the fraction of the present one."""
        return self._consumed_rows / self.rows_per_epoch

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step: ceil(global / micro), fewer where few rows are left."""
        first, end = self._consumed_rows, self._consumed_rows + self._global_batch_size
        if self._rows is not None:
            end = min(end, self._rows)
        assert first < end, "no rows are left"
        self._consumed_rows = end
        rows = [self._row_at(position) for position in range(first, end)]
        return list(_micro_batches(self._dataset, self._packing, rows, self._micro_batch_size))

    def state_dict(self) -> dict[str, int]:
        return {"consumed_rows": self._consumed_rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._consumed_rows = state["consumed_rows"]

    def _row_at(self, position: int) -> int:
        epoch, place = divmod(position, self.rows_per_epoch)
        if self._order_of is None or self._order_of[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order_of = epoch, generator.permutation(self.rows_per_epoch)
        return int(self._order_of[1][place])


def evaluation_batches(dataset: TokenDataset, packing: Packing, micro_batch_size: int) -> Iterator[MicroBatch]:
    """Every row once, in order, `micro_batch_size` rows at a time."""
    return _micro_batches(dataset, packing, range(packing.rows), micro_batch_size)


def _micro_batches(dataset: TokenDataset, packing: Packing, rows: Sequence[int], size: int) -> Iterator[MicroBatch]:
    for first in range(0, len(rows), size):
        yield _micro_batch(dataset, [segment for row in rows[first : first + size] for segment in packing.row(row)])


def _micro_batch(dataset: TokenDataset, segments: Sequence[tuple[int, int]]) -> MicroBatch:
    """Segments, each a (start, length), end to end."""
    inputs, targets = [], []
    for start, length in segments:
        target = dataset.tokens[start : start + length].astype(np.int64)
        before = dataset.tokens[start - 1] if start else dataset.eos_token_id
        inputs.append(np.concatenate([[before], target[:-1]]).astype(np.int64))
        if dataset.mask is not None:
            target[dataset.mask[start : start + length] == 0] = IGNORE  # `inputs` has its own copy
        targets.append(target)
    return MicroBatch(
        torch.from_numpy(np.concatenate(inputs)),
        torch.from_numpy(np.concatenate(targets)),
        tuple(length for _, length in segments),
    )
