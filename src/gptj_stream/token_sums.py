"""Layer norm and embedding whose parameters' gradients, sums over all tokens, are taken in fp32.

PyTorch's CPU kernels take them in bf16 where the activations are bf16, and lose more the more tokens there are: a
norm's gradient over 8192 tokens is off by 7 % (benchmarks/norm_gradients.py). fp32 needs no help; on CUDA PyTorch's own
kernels are used, and have not been measured.

Shape suffixes: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PIECE = 1 << 18
"""Values added at once: they stay in a core's cache."""

CHUNK_BYTES = 1 << 20
"""fp32 activations taken at once in the norm's backward pass: they stay in a core's cache."""


class LayerNorm(nn.LayerNorm):
    def forward(self, x_ND: Tensor) -> Tensor:
        if not _sums_in_bf16(x_ND):
            return super().forward(x_ND)
        out: Tensor = _LayerNorm.apply(x_ND, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return out


class Embedding(nn.Embedding):
    def forward(self, ids_N: Tensor) -> Tensor:
        if not _sums_in_bf16(self.weight):
            return super().forward(ids_N)
        out: Tensor = _Embedding.apply(ids_N, self.weight)  # type: ignore[no-untyped-call]
        return out


def accumulate(total: Tensor, part: Tensor) -> None:
    """`total += part`, in fp32 where `total` is.

    On a CPU PyTorch first makes a copy of the whole of `part` in `total`'s dtype: 0.8 GB of a vocabulary's gradient.
    """
    if total.dtype == part.dtype or total.device.type != "cpu":
        total.add_(part)
        return
    for some, more in zip(total.view(-1).split(_PIECE), part.reshape(-1).split(_PIECE), strict=True):
        some.add_(more)


def _sums_in_bf16(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x_ND, weight_D.shape, weight_D, bias_D, eps)
        ctx.save_for_backward(x_ND, weight_D, bias_D, mean.float(), rstd.float())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad_ND,) = grads
        x_ND, weight_D, bias_D, mean_N1, rstd_N1 = ctx.saved_tensors
        weight, bias = weight_D.float(), bias_D.float()
        grad_x_ND, grad_weight_D, grad_bias_D = torch.empty_like(x_ND), torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, CHUNK_BYTES // (4 * x_ND.shape[1]))
        for i in range(0, len(x_ND), rows):
            part = slice(i, i + rows)
            by_x, by_weight, by_bias = torch.ops.aten.native_layer_norm_backward(
                grad_ND[part].float(),
                x_ND[part].float(),
                weight_D.shape,
                mean_N1[part],
                rstd_N1[part],
                weight,
                bias,
                [True, True, True],
            )
            grad_x_ND[part] = by_x
            grad_weight_D += by_weight
            grad_bias_D += by_bias
        return grad_x_ND, grad_weight_D.to(weight_D.dtype), grad_bias_D.to(bias_D.dtype), None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.shape, ctx.dtype = weight_VD.shape, weight_VD.dtype
        return F.embedding(ids_N, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids_N,), (grad_ND,) = ctx.saved_tensors, grads
        return None, torch.zeros(ctx.shape).index_add_(0, ids_N, grad_ND.float()).to(ctx.dtype)
