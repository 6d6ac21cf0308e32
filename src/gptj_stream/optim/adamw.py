"""AdamW (arXiv 1711.05101) over one layer's flat fp32 buffers, by PyTorch's fused kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from gptj_stream.layout import Layout
from gptj_stream.optim.base import Part, Update


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay on matrices; biases and norms are not decayed unless `decay_vectors`."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_vectors: bool = False

    gradient_dtype: ClassVar[torch.dtype] = torch.float32

    def parts(self, layout: Layout) -> dict[str, Part]:
        return {name: Part(layout.numel, torch.float32) for name in ("weight", "exp_avg", "exp_avg_sq")}

    def set_weights(self, state: dict[str, Tensor], weights: Tensor) -> None:
        state["weight"].copy_(weights)

    def weights(self, state: dict[str, Tensor]) -> Tensor:
        return state["weight"]

    @torch.no_grad()
    def update(self, layer: int, layout: Layout, state: dict[str, Tensor], gradient: Tensor, update: Update) -> None:
        """As the interface says; `gradient` is scaled in place."""
        weight = state["weight"]
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
