from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim.base import Optimizer, Update
from gptj_stream.optim.compact import CompactAdamW
from gptj_stream.seeding import derived_seed

State = dict[str, Tensor]


def layout_of(numel: int, matrix_numel: int | None = None) -> Layout:
    return Layout((), numel, numel if matrix_numel is None else matrix_numel)


def normal(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def new_state(optimizer: Optimizer, layout: Layout, weights: Tensor) -> State:
    state = {name: torch.zeros(part.numel, dtype=part.dtype) for name, part in optimizer.parts(layout).items()}
    optimizer.set_weights(state, weights)
    return state


def exp_avg(state: State) -> Tensor:
    """The decoded first moment."""
    code = state["exp_avg"].double()
    return state["exp_avg_scale"].double().repeat_interleave(64)[: len(code)] * code * code.abs() / 127**2


def root_exp_avg_sq(state: State) -> Tensor:
    """The root of the decoded second moment."""
    code = state["exp_avg_sq"].double()
    return state["exp_avg_sq_scale"].double().repeat_interleave(64)[: len(code)] * (code / 255) ** 2


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_bits(numel: int, key: int) -> NDArray[np.uint32]:
    u32 = np.uint32
    x = np.arange(numel, dtype=u32) ^ u32(key & 0xFFFFFFFF)
    x = (x ^ (x >> u32(16))) * u32(0x7FEB352D)
    x = (x ^ (x >> u32(15)) ^ u32(key >> 32)) * u32(0x846CA68B)
    return x ^ (x >> u32(16))


def oracle(
    optimizer: CompactAdamW, layer: int, layout: Layout, state: State, gradient: Tensor, update: Update
) -> State:
    """The new state by the definition of the format, in fp64."""
    numel, (beta1, beta2) = layout.numel, optimizer.betas
    random = torch.from_numpy(random_bits(numel, derived_seed(optimizer.seed, update.step, layer)).astype(np.int64))
    g = gradient.double() * update.gradient_scale
    m = beta1 * exp_avg(state) + (1 - beta1) * g
    r = (beta2 * root_exp_avg_sq(state) ** 2 + (1 - beta2) * g**2).sqrt()

    decayed = torch.arange(numel) < (numel if optimizer.decay_vectors else layout.matrix_numel)
    w = optimizer.weights(state).double() * (1 - update.learning_rate * optimizer.weight_decay * decayed)
    denominator = r / math.sqrt(1 - beta2**update.step) + optimizer.eps
    w -= update.learning_rate * m / (1 - beta1**update.step) / denominator
    w24 = (w.float().view(torch.int32).long() + (random & 0xFF)) >> 8

    def coded(x: Tensor, codes: int, random: Tensor) -> tuple[Tensor, Tensor]:
        groups = torch.nn.functional.pad(x, (0, -numel % 64)).view(-1, 64)
        scale = groups.abs().amax(1, keepdim=True)
        root = torch.where(scale > 0, groups.abs() / scale, 0).sqrt() * groups.sign() * codes
        fixed = (root * 4096).round().long().flatten()[:numel]
        return (fixed + random) >> 12, scale.flatten()

    exp_avg_code, exp_avg_scale = coded(m, 127, (random >> 8) & 0xFFF)
    exp_avg_sq_code, exp_avg_sq_scale = coded(r, 255, random >> 20)
    return {
        "weight": (w24 << 8).int().view(torch.float32),
        "exp_avg": exp_avg_code,
        "exp_avg_sq": torch.where(r > 0, exp_avg_sq_code.clamp(min=2), 0),
        "exp_avg_scale": exp_avg_scale,
        "exp_avg_sq_scale": exp_avg_sq_scale,
    }


@pytest.mark.parametrize(("numel", "matrix_numel"), [(1, 1), (63, 0), (64, 64), (65, 3), (1000, 700), (20000, 19970)])
@pytest.mark.parametrize("decay_vectors", [False, True])
def test_equals_oracle(numel: int, matrix_numel: int, decay_vectors: bool) -> None:
    """Each of 20 steps, from the state that the last one left."""
    optimizer = CompactAdamW((0.85, 0.97), eps=1e-6, weight_decay=0.3, decay_vectors=decay_vectors, seed=5)
    layout = layout_of(numel, matrix_numel)
    state = new_state(optimizer, layout, normal(numel, 0))
    spread = 10 ** normal(numel, 1)  # sizes of gradients within a group
    different = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), 0)
    for step in range(1, 21):
        gradient = (normal(numel, 1 + step) * spread).bfloat16()
        gradient[step::7] = 0
        update = Update(step, 0.01 / step, 1.0 if step % 3 else 0.37)
        want = oracle(optimizer, 3, layout, state, gradient, update)
        optimizer.update(3, layout, state, gradient, update)
        weights = optimizer.weights(state)
        # one step of 24 bits, and fp32's error where a weight of about 1 came near 0
        torch.testing.assert_close(weights, want["weight"], rtol=2**-15, atol=5e-7)
        different["weight"] += int((weights != want["weight"]).sum())
        for name in ("exp_avg", "exp_avg_sq"):
            distance = (state[name].long() - want[name]).abs()
            assert distance.max() <= 1
            different[name] += int(distance.sum())
            scale = name + "_scale"
            torch.testing.assert_close(state[scale].double(), want[scale], rtol=1e-5, atol=0)  # fp32, may cancel
    # fp32's error of about its last bit changes one rounding in 256 of a weight, one in 4096 of a moment
    assert different["weight"] <= 2 + 20 * numel / 256
    assert different["exp_avg"] <= 2 + 20 * numel / 4096
    assert different["exp_avg_sq"] <= 2 + 20 * numel / 4096


def test_bytes() -> None:
    parts = CompactAdamW().parts(layout_of(6400))
    assert next(iter(parts)) == "weight"
    assert sum(part.nbytes for part in parts.values()) == 6400 * 5.125


@pytest.mark.parametrize("numel", [1, 1000])
def test_weights_round_trip(numel: int) -> None:
    optimizer, layout = CompactAdamW(), layout_of(numel)
    exact = normal(numel, 0) * 10 ** normal(numel, 1)
    state = new_state(optimizer, layout, exact)
    weights = optimizer.weights(state)
    torch.testing.assert_close(weights, exact, rtol=2**-16, atol=0)  # half of the last of 15 bits
    assert torch.equal(weights.view(torch.int32) & 0xFF, torch.zeros(numel, dtype=torch.int32))
    torch.testing.assert_close(state["weight"].float(), exact, rtol=2**-8, atol=0)
    again = new_state(optimizer, layout, weights)
    assert torch.equal(optimizer.weights(again), weights)
    assert torch.equal(again["weight"], state["weight"])


def test_every_correction_round_trips() -> None:
    """All 2**16 low halves of 24 bits, of both signs, over a boundary of bf16's exponent."""
    bits = (torch.arange(1 << 16, dtype=torch.int32) << 8) + 0x3F000000
    weights = torch.cat([bits, bits | -(1 << 31)]).view(torch.float32)
    optimizer = CompactAdamW()
    state = new_state(optimizer, layout_of(weights.numel()), weights)
    assert torch.equal(optimizer.weights(state), weights)
    assert state["correction"].min() == -128
    assert state["correction"].max() == 127


def test_bf16_weights_need_no_correction() -> None:
    weights = normal(1000, 0).bfloat16()
    state = new_state(CompactAdamW(), layout_of(1000), weights.float())
    assert torch.equal(state["weight"], weights)
    assert not state["correction"].any()


def test_rounding_is_unbiased() -> None:
    """Over 400 keys the mean of what is decoded, in the domain of the codes, is what was to be coded."""
    numel, keys = 640, 400
    layout, gradient = layout_of(numel), (normal(numel, 0) * 1e-3).bfloat16()
    weights = normal(numel, 1).abs() + 0.5
    exact = new_state(optimizer := CompactAdamW(weight_decay=0.0), layout, weights)
    start = optimizer.weights(exact).double()
    sums = {name: torch.zeros(numel, dtype=torch.float64) for name in ("weight", "exp_avg", "exp_avg_sq")}
    for seed in range(keys):
        optimizer = CompactAdamW(weight_decay=0.0, seed=seed)
        state = {name: part.clone() for name, part in exact.items()}
        optimizer.update(0, layout, state, gradient, Update(1, 1e-6, 1.0))  # a thirtieth of a step of 24 bits at 1
        sums["weight"] += optimizer.weights(state).double() - start
        sums["exp_avg"] += state["exp_avg"].double()
        sums["exp_avg_sq"] += state["exp_avg_sq"].double()
    g = gradient.double()
    largest = g.view(-1, 64).abs().amax(1).repeat_interleave(64)
    step = 2.0 ** (start.log2().floor() - 15)  # of 24 bits
    for name, want, unit in (
        ("weight", -1e-6 * g / (g.abs() + 1e-8), step),
        ("exp_avg", 127 * (g.abs() / largest).sqrt() * g.sign(), torch.ones(numel)),
        ("exp_avg_sq", 255 * (g.abs() / largest).sqrt(), torch.ones(numel)),
    ):
        error = (sums[name] / keys - want) / unit
        # a rounding's deviation is at most half a step: 0.025 for a mean of 400; 0.001 for the mean of all means
        assert error.abs().max() < 5 * 0.025, name
        assert error.mean().abs() < 4 * 0.025 / math.sqrt(numel), name


def test_random_bits_differ_by_step_layer_and_seed() -> None:
    """Weights rounded up here are not rounded up there: the correlation of 100,000 coins is below 5 / sqrt(100,000)."""
    numel = 100_032
    layout, rounded_up = layout_of(numel), []
    for seed, step, layer in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)):
        optimizer = CompactAdamW((0.0, 0.0), weight_decay=0.0, seed=seed)  # every step is the learning rate
        state = new_state(optimizer, layout, torch.full((numel,), 0.5))
        optimizer.update(layer, layout, state, -torch.ones(numel).bfloat16(), Update(step, 2.0**-17, 1.0))
        rounded_up.append((optimizer.weights(state) > 0.5).double())
    correlation = torch.corrcoef(torch.stack(rounded_up))
    assert (correlation - torch.eye(4)).abs().max() < 0.016
    neighbours = torch.corrcoef(torch.stack([rounded_up[0].roll(shift) for shift in (0, 1, 2, 16, 64)]))
    assert (neighbours - torch.eye(5)).abs().max() < 0.016


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000, 64 * 8192, 64 * 12345 + 17])
def test_same_bits_with_any_number_of_threads(numel: int) -> None:
    layout, states = layout_of(numel, numel - numel // 3), []
    for number in (1, 2, 3):
        optimizer = CompactAdamW(seed=1)
        state = new_state(optimizer, layout, normal(numel, 0))
        with threads(number):
            for step in (1, 2):
                optimizer.update(7, layout, state, normal(numel, step).bfloat16(), Update(step, 1e-3, 0.5))
        states.append(state)
    for state in states[1:]:
        for name, part in state.items():
            assert torch.equal(part, states[0][name]), name


def minimized(
    learning_rate: float, steps: int, optimizer: CompactAdamW, start: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights after noisy gradients of a quadratic, by `optimizer` and by PyTorch's AdamW in fp32."""
    layout = layout_of(start.numel())
    state = new_state(optimizer, layout, start)
    theirs = optimizer.weights(state).clone().requires_grad_()
    torch_adamw = torch.optim.AdamW(
        [theirs], learning_rate, optimizer.betas, optimizer.eps, weight_decay=optimizer.weight_decay
    )
    for step in range(1, steps + 1):
        noise = normal(start.numel(), step)
        theirs.grad = ((theirs.detach() - target) + noise * 0.1).bfloat16().float()
        torch_adamw.step()
        gradient = ((optimizer.weights(state) - target) + noise * 0.1).bfloat16()
        optimizer.update(0, layout, state, gradient, Update(step, learning_rate, 1.0))
    return optimizer.weights(state), theirs.detach()


@pytest.mark.parametrize("learning_rate", [6e-6, 1e-3])
def test_follows_fp32(learning_rate: float) -> None:
    start, target = normal(6400, 1000) * 0.02, normal(6400, 1001) * 0.05
    ours, theirs = minimized(learning_rate, 100, CompactAdamW(), start, target)
    moved, error = theirs - start, ours - theirs
    assert error.norm() < 0.05 * moved.norm()
    assert abs(float((error @ moved) / (moved @ moved))) < 0.005  # neither slower nor faster


def test_moves_where_bf16_stalls() -> None:
    """At a learning rate of 6e-6 a weight of 0.5 moves by 1/650 of the distance of bf16's neighbours."""
    start, target = torch.full((6400,), 0.5), torch.zeros(6400)
    ours, theirs = minimized(6e-6, 50, CompactAdamW(weight_decay=0.0), start, target)
    nearest = start.bfloat16()
    for _ in range(50):
        nearest -= torch.full((6400,), 6e-6).bfloat16()
    assert torch.equal(nearest, start.bfloat16())
    assert (theirs - start).mean() < -2.9e-4
    torch.testing.assert_close((ours - start).mean(), (theirs - start).mean(), rtol=0.005, atol=0)


def zero(step: int) -> Tensor:
    return torch.zeros(640)


def sparse(step: int) -> Tensor:
    """Rows of an embedding: seen once, then not for long; and never."""
    gradient = torch.zeros(10, 64)
    gradient[3] = normal(64, step) * (step == 1)
    gradient[4] = normal(64, step) * (step % 50 == 0)
    return gradient.flatten()


def huge(step: int) -> Tensor:
    return normal(640, step) * (3e38 / 5 if step % 2 else 1e18)


def tiny(step: int) -> Tensor:
    return normal(640, step) * 1e-12


def vanishing(step: int) -> Tensor:
    return normal(640, step) * 1e-38


def mixed(step: int) -> Tensor:
    return normal(640, step) * 10 ** (15 * normal(640, 0)).clamp(-37, 37)


@pytest.mark.parametrize("gradient", [zero, sparse, huge, tiny, vanishing, mixed])
def test_stays_finite(gradient: Callable[[int], Tensor]) -> None:
    optimizer, layout = CompactAdamW(weight_decay=0.0), layout_of(640)
    state = new_state(optimizer, layout, normal(640, 0))
    before = optimizer.weights(state)
    for step in range(1, 1001):
        optimizer.update(0, layout, state, gradient(step).bfloat16(), Update(step, 1e-3, 1.0))
        after = optimizer.weights(state)
        assert all(part.isfinite().all() for part in state.values())
        assert (after - before).abs().max() < 1e-3 * 10
        before = after
    if gradient in (zero, sparse):
        rows = torch.arange(640) // 64
        untouched = rows < 3 if gradient is sparse else rows >= 0
        assert torch.equal(after[untouched], optimizer.weights(new_state(optimizer, layout, normal(640, 0)))[untouched])
        assert not state["exp_avg_sq"][untouched].any()


def test_one_nan_does_not_crash() -> None:
    state = new_state(optimizer := CompactAdamW(), layout_of(65), torch.zeros(65))
    for value in (math.nan, math.inf):
        optimizer.update(0, layout_of(65), state, torch.full((65,), value).bfloat16(), Update(1, 1e-3, 1.0))


def test_rare_gradients_beside_large_ones_move_little() -> None:
    """An element whose gradient is mostly 0, in a group with large ones: no more than 5 learning rates."""
    optimizer, layout = CompactAdamW(weight_decay=0.0), layout_of(6400)
    state = new_state(optimizer, layout, torch.zeros(6400))
    rare = torch.arange(6400) % 64 == 5
    before, largest = optimizer.weights(state), 0.0
    for step in range(1, 301):
        gradient = normal(6400, step)
        gradient[rare] *= 1e-6 * (step % 40 == 1)
        optimizer.update(0, layout, state, gradient.bfloat16(), Update(step, 1e-3, 1.0))
        after = optimizer.weights(state)
        largest = max(largest, float((after - before)[rare].abs().max()))
        before = after
    assert 0 < largest <= 5e-3


def test_small_moments_decay() -> None:
    """Codes that should fall by less than half a step fall all the same: the second moment of a gradient that ended."""
    optimizer, layout = CompactAdamW((0.9, 0.99), weight_decay=0.0), layout_of(64 * 200)
    state = new_state(optimizer, layout, torch.zeros(64 * 200))
    alive = torch.arange(64 * 200) % 64 == 0  # keeps the scale
    gradient = torch.where(alive, 1.0, 1e-2)
    for step in range(1, 301):
        optimizer.update(0, layout, state, gradient.bfloat16(), Update(step, 0.0, 1.0))
        if step == 100:
            gradient = torch.where(alive, 1.0, 0.0)
            at_end = root_exp_avg_sq(state)[~alive].mean()
    ratio = root_exp_avg_sq(state)[~alive].mean() / at_end
    assert ratio == pytest.approx(0.99 ** (200 / 2), rel=0.15)  # each of the 200 roundings adds its variance


def test_numba_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, gptj_stream, gptj_stream.optim.compact; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
