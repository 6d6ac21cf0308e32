from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from gptj_stream.optim import clip_coefficient, scheduled_learning_rate
from gptj_stream.options import Schedule


def rates(schedule: Schedule, *, warmup: int, total: int, minimum: float = 0.0, peak: float = 1.0) -> list[float]:
    return [
        scheduled_learning_rate(
            step, peak=peak, minimum=minimum, warmup_steps=warmup, total_steps=total, schedule=schedule
        )
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_equals_transformers(schedule: Schedule, warmup: int) -> None:
    """transformers counts steps from 0, so its warm-up starts with a step at rate 0; ours leaves that one out."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[schedule]
    theirs = make(optimizer, warmup, 40)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    expected = [*expected[1 : warmup + 1], *expected[warmup:]]
    assert rates(schedule, warmup=warmup, total=40) == pytest.approx(expected, abs=1e-12)  # the same formula, in fp64


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rises_to_the_peak_and_falls_to_the_minimum(schedule: Schedule) -> None:
    values = rates(schedule, warmup=10, total=50, minimum=0.25, peak=2.0)
    assert values[0] == 0.2
    assert values[9] == max(values) == 2.0
    assert 0.25 < values[-1] == min(values[9:]) < 0.30  # the minimum itself is where a 51st step would be
    assert all(a < b for a, b in itertools.pairwise(values[:10]))
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[30] == pytest.approx((2.0 + 0.25) / 2, abs=1e-12)  # half way down, either shape


def test_cosine_is_flat_at_both_ends() -> None:
    cosine, linear = (rates(schedule, warmup=0, total=100) for schedule in ("cosine", "linear"))
    assert cosine[9] > linear[9]
    assert cosine[89] < linear[89]


def test_constant() -> None:
    assert rates("constant", warmup=2, total=5, minimum=0.1, peak=0.5) == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_gpt_j_own_recipe() -> None:
    """mesh-transformer-jax's 6B configuration."""
    values = rates("cosine", warmup=3000, total=300_000, minimum=1.2e-5, peak=1.2e-4)
    assert values[0] == pytest.approx(4e-8)
    assert max(values) == values[2999] == pytest.approx(1.2e-4)
    assert values[-1] == pytest.approx(1.2e-5, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_single_step_and_steps_past_the_end(schedule: Schedule) -> None:
    assert rates(schedule, warmup=0, total=1, minimum=0.5) == [1.0]  # the only step learns at the full rate
    beyond = scheduled_learning_rate(9, peak=1.0, minimum=0.5, warmup_steps=0, total_steps=1, schedule=schedule)
    assert beyond == (1.0 if schedule == "constant" else 0.5)


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 40.0])
@pytest.mark.parametrize("max_norm", [0.5, 1.0, 10.0])
def test_clipping_equals_torch(size: float, max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    gradient = size * torch.randn(50, generator=generator, dtype=torch.float64)
    parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm).item()
    coefficient = clip_coefficient(norm, max_norm)
    assert (coefficient < 1) == (norm > max_norm)
    torch.testing.assert_close(gradient * coefficient, parameter.grad, rtol=1e-12, atol=0)  # fp64 both


def test_zero_does_not_clip() -> None:
    assert clip_coefficient(1e9, 0.0) == 1.0
