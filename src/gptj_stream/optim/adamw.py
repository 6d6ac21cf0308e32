"""AdamW (arXiv 1711.05101) over one layer's flat fp32 buffers, by PyTorch's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptj_stream.layout import Layout


@dataclass(frozen=True)
class Update:
    """What one step does, the same for every layer.

    Attributes:
        step: number of the step, from 1 (bias correction).
        gradient_scale: factor on every gradient; clipping sets it below 1.
    """

    step: int
    learning_rate: float
    gradient_scale: float


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay on matrices; biases and norms are not decayed unless `decay_vectors`."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False

    def new_state(self, layout: Layout, device: torch.device) -> dict[str, Tensor]:
        """First and second moments of one layer, (numel,) fp32, at zero."""
        return {name: torch.zeros(layout.numel, device=device) for name in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def update(
        self, layout: Layout, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], update: Update
    ) -> None:
        """Change `weight` and `state` in place; all are (numel,) fp32. `gradient` is scaled in place."""
        matrices, vectors = slice(0, layout.matrix_numel), slice(layout.matrix_numel, layout.numel)
        for part, decay in ((matrices, True), (vectors, self.decay_vectors)):
            adamw(
                [weight[part]],
                [gradient[part]],
                [state["exp_avg"][part]],
                [state["exp_avg_sq"][part]],
                [],
                [torch.tensor(float(update.step - 1), device=weight.device)],  # the kernel counts up first
                fused=True,
                grad_scale=torch.tensor(1.0 / update.gradient_scale, device=weight.device),  # it divides by this
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=update.learning_rate,
                weight_decay=self.weight_decay if decay else 0.0,
                eps=self.eps,
                maximize=False,
            )
