"""Layers on their way: from their home to the device that computes, and back.

While one layer computes, the next one is fetched, and what changed of the one before is written back. A layer's update
is made when the layer is fetched next: by then the gradients' global norm is known, so clipping is exact and nothing
is stale, and the update needs no pass over the state of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim import Optimizer, Part, Update
from gptj_stream.store.home import Home, MemoryHome
from gptj_stream.trace import Trace

_PIECE = 1 << 16  # values whose norm fp32 sums well


@dataclass
class _Turn:
    """A layer that is away from home.

    Attributes:
        weights: what the passes compute with, in the store's dtype on its device, once it is there.
        arrived: on CUDA, when the weights are.
    """

    layer: int
    state: dict[str, Tensor]
    gradient: Tensor | None
    weights: Tensor | None = None
    slot: int = 0
    arrived: Any = None


class Store:
    """Weights, gradients and optimizer state of every layer, each layer one flat buffer.

    Attributes:
        layouts: one a layer, in the order of the forward pass.
        device: where the weights arrive and the gradients leave.
        dtype: what the weights are computed in.
        home: where the layers rest.
        trace: records what happens when.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        home: Home,
        *,
        device: torch.device,
        dtype: torch.dtype,
        optimizer: Optimizer | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Stream from `home`. Without an optimizer the weights are only read."""
        self.layouts, self.device, self.dtype = layouts, device, dtype
        self.trace = trace or Trace()
        self.home, self._optimizer = home, optimizer
        self._pending = home.pending()
        self._squared_norms: dict[int, Tensor] = {}
        self._sum: Tensor | None = None  # the gradient of the layer whose turn it is, fp32
        self._slots: list[Tensor | None] = [None, None]  # weights in `dtype` on `device`, where home's are not
        self._turns = 0
        self._arriving: list[Future[None]] = []  # gradients on their way home
        self._background = ThreadPoolExecutor(1, "fetch")
        self._crosses = home.device != device
        if self._crosses:
            self._bus = torch.cuda.Stream(device)
            self._used = [torch.cuda.Event(), torch.cuda.Event()]  # when a slot's last layer has been computed with

    def stream(self, order: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Each layer's number and weights, (numel,) in `dtype` on `device`, in this order.

        A buffer is the caller's until the next one is asked for.
        """
        layers = list(order)
        upcoming = self._background.submit(self._fetch, layers[0]) if layers else None
        try:
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                assert upcoming is not None
                with self.trace.span("wait", "layer", layer=layer):
                    turn = upcoming.result()
                # the same layer again can be fetched only when it is back home
                ahead = following not in (None, layer)
                upcoming = self._background.submit(self._fetch, following) if ahead else None  # type: ignore[arg-type]
                weights = self._ready(turn)
                try:
                    with self.trace.span("compute", "layer", layer=layer):
                        yield layer, weights
                finally:
                    self._return(turn)
                if following == layer:
                    upcoming = self._background.submit(self._fetch, following)
        finally:
            if upcoming:
                self._abandon(upcoming)

    def gradient(self, layer: int) -> Tensor:
        """A buffer, (numel,) fp32 on `device`, to write the layer's gradient into."""
        numel = self.layouts[layer].numel
        if self._sum is None:
            self._sum = torch.empty(max(layout.numel for layout in self.layouts), device=self.device)
        return self._sum[:numel]

    def put_gradient(self, layer: int, gradient: Tensor) -> None:
        """Hand over the buffer that `gradient` lent, holding the layer's gradient for the whole step."""
        if layer in self._pending:
            self._settle(layer)  # the gradient that it still needs is about to be replaced
        with self.trace.span("norm", "layer", layer=layer):
            self._squared_norms[layer] = _squared_norm(gradient)
        with self.trace.span("wait", "gradient", layer=layer):
            kept = self.home.gradient(layer)
        with self.trace.span("from device", "gradient", layer=layer):
            if self._crosses:
                rounded = gradient.to(kept.dtype, copy=True)  # the next layer sums in the same buffer
                self._bus.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self._bus):
                    kept.copy_(rounded, non_blocking=True)
                rounded.record_stream(self._bus)
                arrived = self._bus.record_event()
                self._arriving.append(self._background.submit(self._keep_gradient, layer, arrived))
            else:
                kept.copy_(gradient)
                self.home.keep_gradient(layer)

    def gradient_norm(self) -> float:
        """L2 norm over all gradients put since the last `apply`."""
        if not self._squared_norms:
            return 0.0
        return float(torch.stack([square for _, square in sorted(self._squared_norms.items())]).sum().sqrt())

    def apply(self, update: Update, note: Mapping[str, Any] | None = None) -> None:
        """Update every layer from its gradient. The weights that `stream` gives from now on are the new ones.

        Args:
            note: where the run stands with this update; a home that outlives the process keeps it.
        """
        layers = sorted(self._squared_norms)
        for layer in set(self._pending) - set(layers):
            self._settle(layer)
        with self.trace.span("wait", "gradients"):
            for gradient in self._arriving:
                gradient.result()
            self._arriving.clear()
            self.home.commit(update, layers, note or {})
        self._pending = dict.fromkeys(layers, update)
        self._squared_norms.clear()

    @contextmanager
    def state(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """The layer's `weight` and optimizer state, flat, as they are kept, for the block; not to be changed."""
        self._settle(layer)
        state = self.home.fetch(layer, whole=True)
        try:
            yield state
        finally:
            self.home.release(layer)

    def read(self, layer: int) -> dict[str, Tensor]:
        """A copy of the layer's state."""
        with self.state(layer) as state:
            return {name: part.clone() for name, part in state.items()}

    def write(self, layer: int, state: dict[str, Tensor]) -> None:
        """Set what `read` gives; entries that are left out stay as they are."""
        with self._changed(layer) as kept:
            for name, part in state.items():
                kept[name].copy_(part)

    def load(self, layer: int, weights: Tensor) -> None:
        """Set the layer's weights, (numel,) of any floating dtype; the optimizer's state stays."""
        with self._changed(layer) as state:
            if self._optimizer:
                self._optimizer.set_weights(state, weights)
            else:
                state["weight"].copy_(weights)

    def weights(self, layer: int) -> Tensor:
        """The layer's weights as exactly as they are kept; valid until the store is used again."""
        with self.state(layer) as state:
            return self._optimizer.weights(state) if self._optimizer else state["weight"]

    def close(self) -> None:
        """End the threads; what was handed over is kept."""
        self._background.shutdown()
        self.home.close()

    @contextmanager
    def _changed(self, layer: int) -> Iterator[dict[str, Tensor]]:
        self._settle(layer)
        state = self.home.fetch(layer, whole=True)
        try:
            yield state
            self.home.keep(layer)
        finally:
            self.home.release(layer)

    def _fetch(self, layer: int) -> _Turn:
        """In the background. Where home and device differ, the update and the way to the device belong to it too."""
        update = layer in self._pending
        with self.trace.span("read", "layer", layer=layer):
            state = self.home.fetch(layer, whole=update)
            turn = _Turn(layer, state, self.home.fetch_gradient(layer) if update else None)
        if self._crosses:
            self._update(turn)
            turn.slot, self._turns = self._turns % 2, self._turns + 1
            with self.trace.span("to device", "layer", layer=layer), torch.cuda.stream(self._bus):
                self._bus.wait_event(self._used[turn.slot])
                weight = turn.state["weight"]
                target = self._slot(turn.slot, weight)
                target.copy_(weight if weight.dtype == self.dtype else weight.to(self.dtype), non_blocking=True)
                turn.weights, turn.arrived = target, self._bus.record_event()
        return turn

    def _ready(self, turn: _Turn) -> Tensor:
        """The weights to compute with.

        On a CPU the update is made here and not in the background: beside the passes it would take cores from them, and
        a matrix product whose threads do not run at the same time waits for the slowest.
        """
        if self._crosses:
            torch.cuda.current_stream(self.device).wait_event(turn.arrived)
        else:
            self._update(turn)
            weight = turn.state["weight"]
            turn.weights = weight if weight.dtype == self.dtype else self._slot(0, weight).copy_(weight)
        assert turn.weights is not None
        return turn.weights

    def _slot(self, index: int, weight: Tensor) -> Tensor:
        slot = self._slots[index]
        if slot is None:
            largest = max(layout.numel for layout in self.layouts)
            slot = self._slots[index] = torch.empty(largest, dtype=self.dtype, device=self.device)
        return slot[: len(weight)]

    def _update(self, turn: _Turn) -> None:
        if turn.gradient is None:
            return
        assert self._optimizer is not None, "a store without an optimizer is read only"
        layer, update = turn.layer, self._pending.pop(turn.layer)
        with self.trace.span("update", "layer", layer=layer):
            self._optimizer.update(layer, self.layouts[layer], turn.state, turn.gradient, update)
        turn.gradient = None
        self.home.release_gradient(layer)
        self.home.keep(layer, update.step)

    def _return(self, turn: _Turn) -> None:
        if self._crosses:
            self._used[turn.slot].record(torch.cuda.current_stream(self.device))
            turn.arrived.synchronize()  # the copy has left the home's buffer: long done when the layer has been used
        self.home.release(turn.layer)

    def _settle(self, layer: int) -> None:
        """Make the layer's pending update now."""
        if layer in self._pending:
            state = self.home.fetch(layer, whole=True)
            try:
                self._update(_Turn(layer, state, self.home.fetch_gradient(layer)))
            finally:
                self.home.release(layer)

    def _keep_gradient(self, layer: int, arrived: Any) -> None:
        arrived.synchronize()
        self.home.keep_gradient(layer)

    def _abandon(self, upcoming: Future[_Turn]) -> None:
        """The caller has left; bring the layer home that was fetched ahead."""
        with suppress(Exception):  # what stopped the caller is already on its way
            turn = upcoming.result()
            self._ready(turn)
            self._return(turn)


class ResidentStore(Store):
    """Everything in the memory of the device that computes: the reference."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        *,
        device: torch.device,
        dtype: torch.dtype,
        optimizer: Optimizer | None = None,
        trace: Trace | None = None,
    ) -> None:
        home = MemoryHome(
            state_parts(layouts, dtype, optimizer),
            device=device,
            gradient_dtype=optimizer.gradient_dtype if optimizer else torch.float32,
        )
        super().__init__(layouts, home, device=device, dtype=dtype, optimizer=optimizer, trace=trace)


def state_parts(layouts: Sequence[Layout], dtype: torch.dtype, optimizer: Optimizer | None) -> list[dict[str, Part]]:
    """What each layer's state consists of: the optimizer's parts, or without one the weights in `dtype`."""
    if optimizer:
        return [optimizer.parts(layout) for layout in layouts]
    return [{"weight": Part(layout.numel, dtype)} for layout in layouts]


def _squared_norm(gradient: Tensor) -> Tensor:
    """In fp64 over pieces: exact to fp32's last digits, without an fp64 copy of a whole layer."""
    rows, rest = (
        gradient[: len(gradient) // _PIECE * _PIECE].view(-1, _PIECE),
        gradient[len(gradient) // _PIECE * _PIECE :],
    )
    norms = torch.cat((torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest)[None]))
    return norms.double().square().sum()
