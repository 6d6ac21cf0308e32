"""A layer as one flat buffer: which parameter lies where, and views to and from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One parameter's place in its layer's buffer.

    Attributes:
        name: Hugging Face's full name, `transformer.h.3.attn.q_proj.weight`.
        local: the name inside the layer's module, `attn.q_proj.weight`.
        offset: index of its first element in the flat buffer.
    """

    name: str
    local: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """A layer's parameters in one buffer: first the matrices, then the vectors.

    That order makes weight decay, which by custom spares biases and norms, a matter of one boundary.

    Attributes:
        numel: elements of the whole buffer.
        matrix_numel: elements of its matrices; the vectors lie behind them.
    """

    slots: tuple[Slot, ...]
    numel: int
    matrix_numel: int

    @classmethod
    def of(cls, prefix: str, module: nn.Module) -> Layout:
        parameters = sorted(module.named_parameters(), key=lambda item: item[1].dim() < 2)
        slots: list[Slot] = []
        numel = matrix_numel = 0
        for local, parameter in parameters:
            slots.append(Slot(prefix + local, local, tuple(parameter.shape), numel))
            numel += parameter.numel()
            matrix_numel += parameter.numel() * (parameter.dim() >= 2)
        return cls(tuple(slots), numel, matrix_numel)

    def views(self, flat: Tensor) -> Iterator[tuple[Slot, Tensor]]:
        return ((slot, slot.view(flat)) for slot in self.slots)
