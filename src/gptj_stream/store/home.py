"""Where layers rest between their turns: a home keeps each layer's state and gradient, and lends them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gptj_stream.optim import Part, Update
from gptj_stream.store.direct_io import aligned_buffer

Parts = Mapping[str, Part]
"""The arrays of a layer's state by name, `weight` first."""


class Home(Protocol):
    """Layer states at rest. `fetch` may be called from a thread while another layer is lent out.

    Attributes:
        device: where lent tensors are.
    """

    device: torch.device

    def fetch(self, layer: int, *, whole: bool) -> dict[str, Tensor]:
        """Lend the layer's state, or its `weight` alone. At most two layers are lent at a time."""
        ...

    def keep(self, layer: int, step: int | None = None) -> None:
        """The lent state has been changed, and is now that of `step` (None: of the same as before): see that it stays.

        Does not wait.
        """
        ...

    def release(self, layer: int) -> None:
        """The borrower is done with the layer's state."""
        ...

    def gradient(self, layer: int) -> Tensor:
        """A buffer to write the layer's gradient into."""
        ...

    def keep_gradient(self, layer: int) -> None:
        """The buffer that `gradient` lent is filled. Does not wait."""
        ...

    def fetch_gradient(self, layer: int) -> Tensor:
        """Lend the kept gradient."""
        ...

    def release_gradient(self, layer: int) -> None:
        """The borrower is done with the gradient, and has no more use for it."""
        ...

    def commit(self, update: Update, layers: Sequence[int], note: Mapping[str, Any]) -> None:
        """The gradients of `layers` are kept, and `update` is what they do: the state is that of its step from now on.

        Args:
            note: what whoever opens the home again is to know.
        """
        ...

    def pending(self) -> dict[int, Update]:
        """Of a home that is opened again: the layers whose last committed update is still to be made."""
        ...

    def close(self) -> None: ...


class PassiveHome:
    """A home that need not do anything for what it lends to stay."""

    def keep(self, layer: int, step: int | None = None) -> None:
        pass

    def release(self, layer: int) -> None:
        pass

    def gradient(self, layer: int) -> Tensor:
        raise NotImplementedError

    def keep_gradient(self, layer: int) -> None:
        pass

    def fetch_gradient(self, layer: int) -> Tensor:
        raise NotImplementedError

    def release_gradient(self, layer: int) -> None:
        pass

    def commit(self, update: Update, layers: Sequence[int], note: Mapping[str, Any]) -> None:
        pass

    def pending(self) -> dict[int, Update]:
        return {}

    def close(self) -> None:
        pass


class MemoryHome(PassiveHome):
    """Layers in the memory of one device: all of it lent as it is, nothing copied."""

    def __init__(
        self,
        parts: Sequence[Parts],
        *,
        device: torch.device,
        gradient_dtype: torch.dtype = torch.float32,
        pinned: bool = False,
    ) -> None:
        """Allocate every layer.

        Args:
            gradient_dtype: of the gradients, allocated when the first one comes.
            pinned: lock CPU memory for copies to and from CUDA.
        """
        self.device = device
        self._gradient_dtype = gradient_dtype
        self._pinned = pinned
        self._numel = [layer["weight"].numel for layer in parts]
        self._state = [{name: self._new(*part) for name, part in layer.items()} for layer in parts]
        self._gradients: dict[int, Tensor] = {}

    def _new(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._pinned:
            return aligned_buffer(numel * dtype.itemsize, pinned=True)[: numel * dtype.itemsize].view(dtype)
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def fetch(self, layer: int, *, whole: bool) -> dict[str, Tensor]:
        return self._state[layer]

    def gradient(self, layer: int) -> Tensor:
        if layer not in self._gradients:
            self._gradients[layer] = self._new(self._numel[layer], self._gradient_dtype)
        return self._gradients[layer]

    def fetch_gradient(self, layer: int) -> Tensor:
        return self._gradients[layer]
