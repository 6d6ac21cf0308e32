"""From documents to rows: which tokens make one training sequence.

Put one end of text before the token stream and every training pair is (token before, token). A *segment* is a run of
such pairs that attends to itself alone: it is written down as the start and the length of its targets in the stream.
A *row* is one training sequence: segments of at most `sequence_length` tokens together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptj_stream.data.tokens import TokenDataset
from gptj_stream.errors import UserError
from gptj_stream.options import LongDocuments, PackingMode

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """R rows made of S segments.

    Attributes:
        starts: (S,) index in the token stream of the segment's first target; its first input is the token before.
        lengths: (S,) number of targets, as many as inputs.
        row_offsets: (R + 1,) row r is the segments row_offsets[r] .. row_offsets[r + 1].
        dropped_long: documents left out because they were longer than `sequence_length`.
        dropped_without_loss: segments left out because none of their targets carries loss.
    """

    sequence_length: int
    starts: Indices
    lengths: Indices
    row_offsets: Indices
    dropped_long: int
    dropped_without_loss: int

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def efficiency(self) -> float:
        """The share of the rows' capacity that holds tokens."""
        return self.tokens / (self.rows * self.sequence_length)

    def row(self, r: int) -> list[tuple[int, int]]:
        """The (start, length) of row r's segments."""
        span = slice(self.row_offsets[r], self.row_offsets[r + 1])
        return list(zip(self.starts[span].tolist(), self.lengths[span].tolist(), strict=True))


def pack(
    dataset: TokenDataset,
    sequence_length: int,
    packing: PackingMode = "documents",
    long_documents: LongDocuments | None = None,
) -> Packing:
    """Lay a dataset's documents out in rows. Deterministic.

    Args:
        packing: "documents" fills rows with whole documents that do not see each other (best-fit decreasing);
            "concat" cuts the stream every `sequence_length` tokens, each row one segment, as GPT-J was pre-trained;
            "none" puts one document in a row.
        long_documents: what becomes of a document longer than `sequence_length`, except with "concat", which cuts
            anyway: "split" into consecutive segments, or "drop". None drops the ones that begin with a prompt, since
            a completion cut off from its prompt is another task, and splits the texts.

    Raises:
        UserError: no row is left.
    """
    assert sequence_length >= 1
    dropped_long = 0
    if packing == "concat":
        starts, lengths = np.zeros(1, np.int64), np.array([len(dataset.tokens)])
    else:
        prompted = _prompted(dataset)
        starts, lengths = dataset.offsets[:-1] + prompted, dataset.document_lengths - prompted
        if long_documents != "split":
            droppable = prompted if long_documents is None else np.ones_like(prompted)
            kept = (lengths <= sequence_length) | ~droppable
            dropped_long = int((~kept).sum())
            starts, lengths = starts[kept], lengths[kept]
    starts, lengths = _split(starts, lengths, sequence_length)
    learned = _carry_loss(dataset.mask, starts, lengths)
    dropped_without_loss = int((~learned).sum())
    starts, lengths = starts[learned], lengths[learned]
    if not len(starts):
        raise UserError(
            f"{dataset.folder}: no rows to train on: of {dataset.manifest.documents} documents "
            f"({dataset.manifest.tokens} tokens) {dropped_long} are longer than sequence_length {sequence_length} and "
            f"{dropped_without_loss} pieces carry no loss; raise sequence_length or use long_documents split"
        )
    # In "concat" and "none" a segment is a row.
    rows = _best_fit_decreasing(lengths, sequence_length) if packing == "documents" else np.arange(len(lengths))
    order = np.argsort(rows, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Packing(sequence_length, starts[order], lengths[order], row_offsets, dropped_long, dropped_without_loss)


def _prompted(dataset: TokenDataset) -> npt.NDArray[np.bool_]:
    """(D,) whether the document begins with a prompt.

    The first token of a text is predicted from the end of text before it. The first token of a prompt is not
    predicted, so it is no target.
    """
    first = dataset.offsets[:-1]
    return np.zeros(len(first), np.bool_) if dataset.mask is None else dataset.mask[first] == 0


def _split(starts: Indices, lengths: Indices, size: int) -> tuple[Indices, Indices]:
    """Cut each span into consecutive ones of `size`, the last one shorter."""
    counts = -(-lengths // size)
    owner = np.repeat(np.arange(len(starts)), counts)
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its span
    return starts[owner] + place * size, np.minimum(size, lengths[owner] - place * size)


def _carry_loss(mask: npt.NDArray[np.uint8] | None, starts: Indices, lengths: Indices) -> npt.NDArray[Any]:
    """(S,) bool: whether any target of the segment carries loss. Segments are disjoint and ascending."""
    if mask is None or not len(starts):
        return np.ones(len(starts), bool)
    bounds = np.stack([starts, starts + lengths], axis=1).ravel()
    # reduceat takes runs between successive bounds: every second one is a segment, the others are what lies between.
    # The last run goes to the end, hence the cut.
    return np.maximum.reduceat(mask[: bounds[-1]], bounds[:-1])[::2] > 0


def _best_fit_decreasing(lengths: Indices, capacity: int) -> Indices:
    """(S,) row of each segment: longest first, each into the fullest row that still has room for it."""
    rows = np.empty(len(lengths), np.int64)
    count = 0
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    rooms = 0  # the same as a set of bits: bit n is set where a row with room n exists. Finds the best fit in one step
    longest_first = np.argsort(-lengths, kind="stable")
    for segment, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        rows[segment] = row
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
