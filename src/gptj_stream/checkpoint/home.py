"""A checkpoint's files as a home: for evaluation and generation with a model that does not fit in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from queue import SimpleQueue

import torch
from torch import Tensor

from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.layout import Layout
from gptj_stream.store import PassiveHome
from gptj_stream.store.direct_io import aligned_buffer


class CheckpointHome(PassiveHome):
    """Reads a layer's tensors when it is fetched; the layers `in_memory` are read once and stay."""

    device = torch.device("cpu")

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Sequence[Layout],
        *,
        dtype: torch.dtype,
        in_memory: Collection[int] = (),
        pinned: bool = False,
    ) -> None:
        """Raises:
        UserError: a tensor is missing or unexpected.
        """
        checkpoint.check(layouts)
        self._checkpoint, self._layouts, self._dtype = checkpoint, layouts, dtype
        self._lent: dict[int, Tensor] = {}
        self._buffers: SimpleQueue[Tensor] = SimpleQueue()
        largest = max(layout.numel for layout in layouts)
        for _ in range(2):
            self._buffers.put(self._new(largest, pinned))
        self._in_memory = {layer: self._new(layouts[layer].numel, pinned) for layer in in_memory}
        for layer, flat in self._in_memory.items():
            checkpoint.read_layer(layouts[layer], flat)

    def fetch(self, layer: int, *, whole: bool) -> dict[str, Tensor]:
        if layer in self._in_memory:
            return {"weight": self._in_memory[layer]}
        buffer = self._lent[layer] = self._buffers.get()
        flat = buffer[: self._layouts[layer].numel]
        self._checkpoint.read_layer(self._layouts[layer], flat)
        return {"weight": flat}

    def release(self, layer: int) -> None:
        if layer in self._lent:
            self._buffers.put(self._lent.pop(layer))

    def _new(self, numel: int, pinned: bool) -> Tensor:
        nbytes = numel * self._dtype.itemsize
        return aligned_buffer(nbytes, pinned=pinned)[:nbytes].view(self._dtype)
