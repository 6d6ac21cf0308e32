"""AdamW with 5.125 bytes of state a parameter, for layers in CPU memory: 24-bit weights and 8-bit moments.

Every 64 elements share a scale for each moment. The moments' codes are spaced by a root, since what matters is their
ratio to their own size: with q in -127...127 and p in 0...255,

    exp_avg = scale * q |q| / 127**2        sqrt(exp_avg_sq) = scale * p**2 / 255**2

and scale is the group's largest |exp_avg|, the group's largest sqrt(exp_avg_sq). All of it is rounded stochastically:
rounding to nearest would lose every weight's change below half a step, and would hold a small moment where it is when
it should decay by less than half a code. A step computes in fp32 from what it decoded and codes what it got, so that
no step sees its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim.adamw import AdamW
from gptj_stream.optim.base import Part, Update
from gptj_stream.seeding import derived_seed

_GROUP = 64
_PIECE = 1 << 14  # groups that a thread takes at a time: about 1 ms of work, which Python's 0.03 are little beside
_CHUNK = 1 << 22  # elements of a temporary


@dataclass(frozen=True)
class CompactAdamW(AdamW):
    """AdamW's arithmetic on a state that it reads and writes as codes.

    The weight is the top 24 bits of an fp32: `weight` is their nearest bf16 and `correction` what that misses, in the
    24th bit. Random bits follow from `seed`, the step, the layer and the element's place, and so does the result: the
    number of threads does not change it.
    """

    seed: int = 0

    gradient_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def parts(self, layout: Layout) -> dict[str, Part]:
        groups = -(-layout.numel // _GROUP)
        return {
            "weight": Part(layout.numel, torch.bfloat16),
            "correction": Part(layout.numel, torch.int8),
            "exp_avg": Part(layout.numel, torch.int8),
            "exp_avg_sq": Part(layout.numel, torch.uint8),
            "exp_avg_scale": Part(groups, torch.float32),
            "exp_avg_sq_scale": Part(groups, torch.float32),
        }

    @torch.no_grad()
    def set_weights(self, state: dict[str, Tensor], weights: Tensor) -> None:
        parts = state["weight"].view(torch.int16), state["correction"], weights.view(torch.int32)
        for high, low, exact in zip(*(part.split(_CHUNK) for part in parts), strict=True):
            bits = exact + 0x80  # half of the 24th bit
            high.copy_((bits + 0x8000) >> 16)
            low.copy_(bits >> 8)  # the copy keeps the low byte, as a signed number

    @torch.no_grad()
    def weights(self, state: dict[str, Tensor]) -> Tensor:
        weights = state["weight"].float()
        weights.view(torch.int32).add_(state["correction"], alpha=1 << 8)
        return weights

    @torch.no_grad()
    def update(self, layer: int, layout: Layout, state: dict[str, Tensor], gradient: Tensor, update: Update) -> None:
        from gptj_stream.optim.compact_kernel import Step, update_groups  # noqa: PLC0415 - numba takes a second to import

        elements = [
            tensor.numpy()
            for tensor in (
                state["weight"].view(torch.int16),
                state["correction"],
                state["exp_avg"],
                state["exp_avg_sq"],
                gradient.view(torch.int16),
            )
        ]
        scales = [state[name].numpy() for name in ("exp_avg_scale", "exp_avg_sq_scale")]
        key = derived_seed(self.seed, update.step, layer)
        decay = 1.0 - update.learning_rate * self.weight_decay
        step = Step(
            key=np.uint32(key & 0xFFFFFFFF),
            second_key=np.uint32(key >> 32),
            matrix_numel=layout.matrix_numel,
            matrix_decay=np.float32(decay),
            vector_decay=np.float32(decay if self.decay_vectors else 1.0),
            gradient_scale=np.float32(update.gradient_scale),
            beta1=np.float32(self.betas[0]),
            beta2=np.float32(self.betas[1]),
            root_beta2=np.float32(self.betas[1] ** 0.5),
            size=np.float32(update.learning_rate / (1.0 - self.betas[0] ** update.step)),
            root_correction=np.float32((1.0 - self.betas[1] ** update.step) ** -0.5),
            eps=np.float32(self.eps),
        )

        def run(first: int, last: int) -> None:
            rows = (array[first * _GROUP : last * _GROUP].reshape(-1, _GROUP) for array in elements)
            update_groups(*rows, *(scale[first:last] for scale in scales), first, step)

        groups, rest = divmod(layout.numel, _GROUP)
        _in_threads(run, groups)
        if rest:  # the last, partial group, filled up with zeros, which stay zeros and do not change its maxima
            padded = [np.zeros((1, _GROUP), array.dtype) for array in elements]
            for row, array in zip(padded, elements, strict=True):
                row[0, :rest] = array[-rest:]
            update_groups(*padded, *(scale[groups:] for scale in scales), groups, step)
            for row, array in zip(padded, elements, strict=True):
                array[-rest:] = row[0, :rest]


def _in_threads(run: Callable[[int, int], None], groups: int) -> None:
    """`run` over all groups, piece by piece, by as many threads as PyTorch has: the compiled code needs no lock."""
    threads, starts = torch.get_num_threads(), range(0, groups, _PIECE)
    if threads == 1 or len(starts) == 1:
        run(0, groups)
    else:  # many small pieces, so that a thread that was interrupted does not hold up the end
        list(_pool(threads).map(lambda start: run(start, min(start + _PIECE, groups)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "compact-adamw")
