"""Cross-entropy of a vocabulary projection, in chunks: the (N, V) logits never exist at once.

Shape suffixes: N positions, C positions of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_stream.batch import IGNORE, ROW_MULTIPLE
from gptj_stream.token_sums import accumulate

CHUNK_BYTES = 1 << 26
"""Size of a chunk's fp32 logits. 64 MiB is 320 rows of GPT-J's vocabulary."""


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target under softmax(h @ weight.T + bias), (N,) fp32; 0 where ignored.

    Only positions with a target are projected. With gradients on, the gradients of the *sum* of the result are taken
    in the same pass over each chunk, so the logits are computed once; the backward pass therefore takes one common
    gradient for all positions (a sum or mean of the result, not a weighting of it).
    """
    kept = (targets_N != IGNORE).nonzero().squeeze(1)
    filler = -len(kept) % ROW_MULTIPLE
    h, targets = F.pad(h_ND[kept], (0, 0, 0, filler)), F.pad(targets_N[kept], (0, filler))
    nll: Tensor = _LinearCrossEntropy.apply(h, weight_VD, bias_V, targets, len(kept))  # type: ignore[no-untyped-call]
    return nll.new_zeros(targets_N.shape).index_copy(0, kept, nll[: len(kept)])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, count: int) -> Tensor:
        """Rows from `count` on are filler: they get a result, and no gradient."""
        differentiate = any(ctx.needs_input_grad)
        nll_N = h_ND.new_empty(len(h_ND), dtype=torch.float32)
        if differentiate:
            grad_h_ND = torch.empty_like(h_ND)
            # fp32, since bf16 would round the sum once a chunk
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * len(weight_VD) * ROW_MULTIPLE)) * ROW_MULTIPLE
        for start in range(0, len(h_ND), rows):
            chunk = slice(start, start + rows)
            logits_CV = torch.addmm(bias_V, h_ND[chunk], weight_VD.T).float()
            target_C1 = targets_N[chunk, None]
            log_z_C1 = logits_CV.logsumexp(-1, keepdim=True)
            nll_N[chunk] = (log_z_C1 - logits_CV.gather(-1, target_C1)).squeeze(-1)
            if differentiate:
                grad_CV = logits_CV.sub_(log_z_C1).exp_()
                grad_CV.scatter_add_(-1, target_C1, torch.full_like(log_z_C1, -1.0))
                grad_CV[max(0, count - start) :] = 0
                grad_bias_V += grad_CV.sum(0)
                grad_CV = grad_CV.to(h_ND.dtype)
                torch.mm(grad_CV, weight_VD, out=grad_h_ND[chunk])
                accumulate(grad_weight_VD, grad_CV.T @ h_ND[chunk])
        if differentiate:
            ctx.save_for_backward(grad_h_ND, grad_weight_VD.to(weight_VD.dtype), grad_bias_V.to(bias_V.dtype))
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        # One value for all positions, by the contract above; autograd hands it on as an expanded or filled tensor.
        (grad_N,) = grads
        scale = grad_N[:1].sum()
        # in place: at GPT-J's size a second copy of the projection's gradient is 800 MB
        grad_h, grad_weight, grad_bias = (grad.mul_(scale) for grad in ctx.saved_tensors)
        return grad_h, grad_weight, grad_bias, None, None
