"""Everything in the memory of the device that computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Update


class ResidentStore:
    """The reference store: weights stay on the device.

    With an optimizer the weights are kept in fp32, beside fp32 gradients and moments (16 bytes a parameter), and cast
    to `dtype` when their layer is streamed. Without one they are kept in `dtype` and only read.
    """

    def __init__(
        self, layouts: Sequence[Layout], *, device: torch.device, dtype: torch.dtype, optimizer: AdamW | None = None
    ) -> None:
        self.layouts = layouts
        self.device = device
        self.dtype = dtype
        self._optimizer = optimizer
        kept_dtype = torch.float32 if optimizer else dtype
        self._state: list[dict[str, Tensor]] = []
        for layout in layouts:
            state = {"weight": torch.zeros(layout.numel, dtype=kept_dtype, device=device)}
            if optimizer:
                state |= optimizer.new_state(layout, device)
            self._state.append(state)
        self._gradients: dict[int, Tensor] = {}
        self._squared_norms: dict[int, Tensor] = {}

    def stream(self, order: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        for layer in order:
            yield layer, self._state[layer]["weight"].to(self.dtype)

    def gradient(self, layer: int) -> Tensor:
        if layer not in self._gradients:
            self._gradients[layer] = torch.empty(self.layouts[layer].numel, device=self.device)
        return self._gradients[layer]

    def put_gradient(self, layer: int, gradient: Tensor) -> None:
        assert gradient is self._gradients[layer]
        # summed in fp64: the norm of 200 M values is then exact to fp32's last digit, in whatever order
        self._squared_norms[layer] = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()

    def gradient_norm(self) -> float:
        if not self._squared_norms:
            return 0.0
        return float(torch.stack([square for _, square in sorted(self._squared_norms.items())]).sum().sqrt())

    def apply(self, update: Update) -> None:
        assert self._optimizer is not None, "a store without an optimizer is read only"
        for layer in self._squared_norms:
            state = self._state[layer]
            self._optimizer.update(self.layouts[layer], state["weight"], self._gradients[layer], state, update)
        self._squared_norms.clear()

    def read(self, layer: int) -> dict[str, Tensor]:
        return self._state[layer]

    def write(self, layer: int, state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            self._state[layer][name].copy_(tensor)
