"""What one pass through the model consumes: documents laid end to end in one stream of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that carries no loss (PyTorch's and Hugging Face's value)."""

ROW_MULTIPLE = 64
"""Numbers of rows are rounded up to this before they reach a matrix product or an attention kernel.

On a CPU in bf16, PyTorch compiles and keeps a kernel for every number of rows it meets: a millisecond and 0.7 MB for a
product, 10 milliseconds and 4 MB for attention with its backward pass (benchmarks/row_counts.py). Documents come in
many lengths, so most of a step would go there. Row for row, what is added changes nothing.
"""


@dataclass(frozen=True)
class MicroBatch:
    """N tokens of several documents, end to end, without padding.

    A document attends to itself alone and its positions count from 0, so it makes no difference to a document which
    others share its micro-batch.

    Attributes:
        input_ids: (N,) int64.
        targets: (N,) int64, the token that follows, or `IGNORE` where the position carries no loss.
        lengths: the documents' lengths in order; they sum to N.
    """

    input_ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.targets.shape == (sum(self.lengths),)

    @cached_property
    def target_count(self) -> int:
        """How many positions carry loss."""
        return int((self.targets != IGNORE).sum())

    @cached_property
    def positions(self) -> Tensor:
        """(N,) int64: each token's place in its document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def padded(self) -> MicroBatch:
        """The same with a document of filler behind, without targets, up to a multiple of `ROW_MULTIPLE` tokens."""
        filler = -len(self.input_ids) % ROW_MULTIPLE
        if not filler:
            return self
        input_ids = F.pad(self.input_ids, (0, filler))
        return MicroBatch(input_ids, F.pad(self.targets, (0, filler), value=IGNORE), (*self.lengths, filler))

    @property
    def mean_context(self) -> float:
        """Mean number of positions that a token attends to."""
        return sum(n * (n + 1) / 2 for n in self.lengths) / sum(self.lengths)
