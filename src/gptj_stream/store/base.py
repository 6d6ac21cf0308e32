"""The interface between the layers' home and those who compute with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim import Update


class Store(Protocol):
    """Weights, gradients and optimizer state of every layer, each layer one flat buffer.

    Attributes:
        layouts: one a layer, in the order of the forward pass.
        device: where the weights arrive and the gradients leave.
        dtype: what the weights are computed in.
    """

    layouts: Sequence[Layout]
    device: torch.device
    dtype: torch.dtype

    def stream(self, order: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Each layer's number and weights, (numel,) in `dtype` on `device`, in this order.

        A buffer is the caller's until the next one is asked for; a store may read ahead meanwhile.
        """
        ...

    def gradient(self, layer: int) -> Tensor:
        """A buffer, (numel,) fp32 on `device`, to write the layer's gradient into."""
        ...

    def put_gradient(self, layer: int, gradient: Tensor) -> None:
        """Hand over the buffer that `gradient` lent, holding the layer's gradient for the whole step."""
        ...

    def gradient_norm(self) -> float:
        """L2 norm over all gradients put since the last `apply`."""
        ...

    def apply(self, update: Update) -> None:
        """Update every layer from its gradient. The weights that `stream` gives from now on are the new ones."""
        ...

    def read(self, layer: int) -> dict[str, Tensor]:
        """The layer's `weight` and optimizer state, flat, as they are kept; not to be changed."""
        ...

    def write(self, layer: int, state: dict[str, Tensor]) -> None:
        """Set what `read` gives; entries that are left out stay as they are."""
        ...
