"""GPT-J's feed-forward, with as much kept for the backward pass as its caller can afford.

Autograd would keep three tensors: the input and, four times as wide, the values before and after GELU. Those after are
computed again here for next to nothing, those before as well where memory is short.

Shape suffixes: N tokens, D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def feed_forward(
    x_ND: Tensor, w_in_FD: Tensor, b_in_F: Tensor, w_out_DF: Tensor, b_out_D: Tensor, *, keep_inner: bool
) -> Tensor:
    """gelu(x @ w_in.T + b_in) @ w_out.T + b_out, (N, D), with GELU's tanh form (Hugging Face's `gelu_new`).

    Args:
        keep_inner: whether the values before GELU, (N, F), stay for the backward pass. Without them it takes the first
            matrix product once more, and finds the same bits.
    """
    out: Tensor = _FeedForward.apply(x_ND, w_in_FD, b_in_F, w_out_DF, b_out_D, keep_inner)  # type: ignore[no-untyped-call]
    return out


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, w_in_FD: Tensor, b_in_F: Tensor, w_out_DF: Tensor, b_out_D: Tensor, keep_inner: bool
    ) -> Tensor:
        inner_NF = F.linear(x_ND, w_in_FD, b_in_F)
        ctx.save_for_backward(x_ND, w_in_FD, b_in_F, w_out_DF, inner_NF if keep_inner else None)
        return F.linear(F.gelu(inner_NF, approximate="tanh"), w_out_DF, b_out_D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
        (grad_ND,) = grads
        x_ND, w_in_FD, b_in_F, w_out_DF, inner_NF = ctx.saved_tensors
        if inner_NF is None:
            inner_NF = F.linear(x_ND, w_in_FD, b_in_F)
        grad_w_out_DF = grad_ND.T @ F.gelu(inner_NF, approximate="tanh")
        grad_NF = torch.ops.aten.gelu_backward(grad_ND @ w_out_DF, inner_NF, approximate="tanh")
        return grad_NF @ w_in_FD, grad_NF.T @ x_ND, grad_NF.sum(0), grad_w_out_DF, grad_ND.sum(0), None
