"""Learning rate over the steps, and the clipping factor."""

from __future__ import annotations

import math

from gptj_stream.options import Schedule


def scheduled_learning_rate(
    step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int, schedule: Schedule
) -> float:
    """Learning rate of `step` (from 1): linearly up to `peak`, then down towards `minimum`.

    The minimum is where a step after the last one would be, so the last step still learns.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    done = min(1.0, (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return minimum + (peak - minimum) * remaining


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Factor that brings gradients of global `norm` to at most `max_norm`; 0 as `max_norm` means no clipping.

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
