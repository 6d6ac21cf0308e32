"""Every layer's state in one file, in which no moment leaves a layer half written.

Layers of nearly one size share places, one more than there are layers. A changed state goes to the free place, then
that place's first page says which layer it holds and of which step, then the place it came from is the free one. So
whoever opens the file after a crash finds every layer whole, at one of two steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gptj_stream.errors import UserError
from gptj_stream.store.direct_io import ALIGNMENT, DirectFile, aligned, aligned_buffer
from gptj_stream.store.home import Parts


def record_bytes(parts: Parts) -> int:
    """Disk space of a layer's state, each part on pages of its own."""
    return sum(aligned(part.nbytes) for part in parts.values())


def state_file_bytes(parts: Sequence[Parts]) -> int:
    return sum(group.nbytes * (len(group.layers) + 1) for group in _groups(parts))


class _Group(NamedTuple):
    """Layers that share places of `nbytes` each, one more than there are layers."""

    layers: list[int]
    nbytes: int


def _groups(parts: Sequence[Parts]) -> list[_Group]:
    """A small model's blocks are far smaller than its embedding; in GPT-J-6B all layers are nearly equal."""
    groups: list[_Group] = []
    for layer in sorted(range(len(parts)), key=lambda layer: -record_bytes(parts[layer])):
        nbytes = ALIGNMENT + record_bytes(parts[layer])
        if not groups or nbytes < 0.9 * groups[-1].nbytes:
            groups.append(_Group([], nbytes))
        groups[-1].layers.append(layer)
    return groups


class StateFile:
    """See the module.

    Attributes:
        steps: of each layer's state.
        direct: as of `DirectFile`.
    """

    def __init__(self, path: Path, parts: Sequence[Parts], *, new: bool) -> None:
        """Open the file, or make one in which every state is zeros.

        Raises:
            UserError: it is not whole.
            OSError: it cannot be made, or the disk is too full.
        """
        self.steps = [0] * len(parts)
        self._offsets: list[int] = []  # of the places
        self._places = [0] * len(parts)  # where each layer is
        self._free: list[int] = []  # each group's free place
        self._group_of = [0] * len(parts)
        self._writes = 0  # so far
        end = 0
        for number, group in enumerate(_groups(parts)):
            for layer in (*group.layers, None):
                if layer is None:
                    self._free.append(len(self._offsets))
                else:
                    self._places[layer], self._group_of[layer] = len(self._offsets), number
                self._offsets.append(end)
                end += group.nbytes
        self._file = DirectFile(path, end, new=new)
        self.direct = self._file.direct
        self._page = aligned_buffer(ALIGNMENT)
        if not new:
            self._find_layers()

    def read(self, layer: int, start: int, buffer: Tensor) -> None:
        """Fill `buffer` with the layer's record from byte `start` on."""
        self._file.read(self._offsets[self._places[layer]] + ALIGNMENT + start, buffer)

    def write(self, layer: int, step: int, pieces: Sequence[Tensor]) -> None:
        """Replace the layer's record by these pieces, end to end. One thread at a time."""
        group = self._group_of[layer]
        free = self._free[group]
        offset = self._offsets[free] + ALIGNMENT
        for piece in pieces:
            self._file.write(offset, piece)
            offset += len(piece)
        self._file.sync()
        stamp = json.dumps([layer, step, self._writes]).encode()
        self._page.zero_().numpy()[: len(stamp)] = bytearray(stamp)
        self._file.write(self._offsets[free], self._page)
        self._file.sync()
        self._places[layer], self._free[group] = free, self._places[layer]
        self.steps[layer] = step
        self._writes += 1

    def close(self) -> None:
        self._file.close()

    def _find_layers(self) -> None:
        newest: dict[int, tuple[int, int, int]] = {}  # layer -> (number of the write, step, place)
        for place, offset in enumerate(self._offsets):
            self._file.read(offset, self._page)
            try:
                layer, step, number = map(int, json.loads(bytes(self._page.numpy()).rstrip(b"\0")))
            except (ValueError, TypeError):
                continue  # never written
            newest[layer] = max(newest.get(layer, (-1, -1, -1)), (number, step, place))
        for layer in range(len(self._places)):
            if layer not in newest:
                raise UserError(f"{self._file.path}: layer {layer} is not there; the file is damaged")
            number, self.steps[layer], self._places[layer] = newest[layer]
            self._writes = max(self._writes, number + 1)
        self._free = sorted(set(range(len(self._offsets))) - set(self._places))  # groups lie one behind the other
