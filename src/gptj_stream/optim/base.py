"""The interface between an optimizer and the stores that keep its state: one layer, flat, in named parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gptj_stream.layout import Layout


class Part(NamedTuple):
    """One flat array of a layer's state."""

    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Update:
    """What one step does, the same for every layer.

    Attributes:
        step: number of the step, from 1 (bias correction, random bits).
        gradient_scale: factor on every gradient; clipping sets it below 1.
    """

    step: int
    learning_rate: float
    gradient_scale: float


class Optimizer(Protocol):
    """How a layer's weights and moments are kept, and what a gradient does to them.

    Attributes:
        gradient_dtype: what a layer's gradient is kept in between the backward pass and the update.
    """

    @property
    def gradient_dtype(self) -> torch.dtype: ...

    def parts(self, layout: Layout) -> dict[str, Part]:
        """The arrays that make up a layer's state, `weight` first: the one that the passes compute with."""
        ...

    def set_weights(self, state: dict[str, Tensor], weights: Tensor) -> None:
        """Write (numel,) fp32 weights into the state; the moments stay."""
        ...

    def weights(self, state: dict[str, Tensor]) -> Tensor:
        """The state's weights as exactly as it knows them, (numel,) fp32."""
        ...

    def update(self, layer: int, layout: Layout, state: dict[str, Tensor], gradient: Tensor, update: Update) -> None:
        """Change `state` in place. `gradient` is (numel,) in `gradient_dtype`, and may be overwritten."""
        ...
