from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptj_stream import loss
from gptj_stream.batch import IGNORE
from gptj_stream.loss import linear_cross_entropy

N, D, V = 23, 16, 37


def inputs(dtype: torch.dtype = torch.float32, rows: int = N, ignored: float = 0.3) -> tuple[list[Tensor], Tensor]:
    """Hidden states, weight and bias, and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in ((rows, D), (V, D), (V,))]
    targets = torch.randint(V, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], targets


def reference(leaves: list[Tensor], targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Each position's loss, and the gradients of 0.7 times their sum, by PyTorch in `dtype`."""
    copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    nll = F.cross_entropy(F.linear(*copies), targets, ignore_index=IGNORE, reduction="none")
    return nll.detach(), torch.autograd.grad(nll.sum() * 0.7, copies)


def ours(leaves: list[Tensor], targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    nll = linear_cross_entropy(leaves[0], leaves[1], leaves[2], targets)
    return nll.detach(), torch.autograd.grad(nll.sum() * 0.7, leaves)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.fixture(params=[1, 3, 7, N, 1000], ids=lambda rows: f"{rows}-rows-a-chunk")
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of one row, of divisors and non-divisors of the rows, of all of them and of more."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", request.param * 4 * V)
    return int(request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_equals_cross_entropy_in_fp64(ignored: float) -> None:
    leaves, targets = inputs(ignored=ignored)
    nll, grads = ours(leaves, targets)
    expected, expected_grads = reference(leaves, targets, torch.float64)
    assert nll.dtype == torch.float32
    # 5e-6: fp32's 6e-8 on logits of up to 15, in sums of up to 37 terms
    torch.testing.assert_close(nll.double(), expected, rtol=5e-6, atol=5e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("chunked")
def test_slopes_by_finite_differences() -> None:
    """The gradient against the function's own slope along random directions: no other implementation is trusted."""
    leaves, targets = inputs(torch.float64)
    _, grads = ours(leaves, targets)
    generator = torch.Generator().manual_seed(1)
    for i, grad in enumerate(grads):
        direction = torch.randn(leaves[i].shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        values = []
        for step in (0.05, -0.05):
            moved = [leaf.detach() for leaf in leaves]
            moved[i] = moved[i] + step * direction
            values.append(0.7 * linear_cross_entropy(moved[0], moved[1], moved[2], targets).double().sum())
        slope = (values[0] - values[1]) / 0.1
        # 2e-5 of the gradient's length: the central difference is off by 0.05^2 / 6 third derivatives, and by the
        # results' fp32 rounding over the step of 0.1; measured 3e-6
        assert abs(slope - (grad * direction).sum()) < 2e-5 * grad.norm()


@pytest.mark.usefixtures("chunked")
def test_bf16() -> None:
    """Logits are rounded to bf16 by the matrix product, as PyTorch's are; everything after is fp32. So our error
    against fp64 is about that of PyTorch's own cross-entropy in bf16."""
    leaves, targets = inputs(torch.bfloat16)
    nll, grads = ours(leaves, targets)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 3
    exact, exact_grads = reference(leaves, targets, torch.float64)
    theirs, their_grads = reference(leaves, targets, torch.bfloat16)
    # 1.2: measured 1.07 for the losses and 0.7 to 0.95 for the gradients, of roundings that differ in place
    assert rms(nll - exact) < 1.2 * rms(theirs - exact)
    for grad, exact_grad, their_grad in zip(grads, exact_grads, their_grads, strict=True):
        assert rms(grad - exact_grad) < 1.2 * rms(their_grad - exact_grad)


def test_bf16_sums_over_chunks_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 chunks of one row do no worse than one chunk of 512 rows: bf16 sums would lose one term in 256."""
    leaves, targets = inputs(torch.bfloat16, rows=512)
    _, exact_grads = reference(leaves, targets, torch.float64)
    errors = []
    for rows in (512, 1):
        monkeypatch.setattr(loss, "CHUNK_BYTES", rows * 4 * V)
        _, grads = ours(leaves, targets)
        errors.append([rms(grad - exact) / rms(exact) for grad, exact in zip(grads, exact_grads, strict=True)])
    for whole, chunks in zip(*errors, strict=True):
        assert chunks < 1.5 * whole + 1e-4  # measured 1.0 to 1.05; summed in bf16, weight and bias give 3.4 and 7.7


def test_gradients_do_not_change_the_values() -> None:
    leaves, targets = inputs()
    nll, _ = ours(leaves, targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(leaves[0], leaves[1], leaves[2], targets), nll)


def test_ignored_positions_are_zero_and_get_no_gradient() -> None:
    leaves, targets = inputs()
    nll, grads = ours(leaves, targets)
    ignored = targets == IGNORE
    assert 0 < ignored.sum() < N
    assert torch.equal(nll == 0, ignored)
    assert torch.equal(grads[0].abs().sum(-1) == 0, ignored)


def test_no_targets_at_all() -> None:
    leaves, targets = inputs(ignored=1.1)
    nll, grads = ours(leaves, targets)
    assert torch.equal(nll, torch.zeros(N))
    assert [grad.count_nonzero().item() for grad in grads] == [0, 0, 0]


@pytest.mark.usefixtures("chunked")
def test_large_logits_stay_finite() -> None:
    """exp overflows fp32 from 89 on; the largest logit is taken off first."""
    leaves, targets = inputs(ignored=0.0)
    scaled = [(leaf * 1e3).detach().requires_grad_() for leaf in leaves]
    nll, grads = ours(scaled, targets)
    expected, expected_grads = reference(scaled, targets, torch.float64)
    # 10: fp32 logits of up to 1e7 have their last digit at 1, and are sums of 16 terms; measured 2.5
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=10.0)
    assert all(grad.isfinite().all() for grad in grads)
    # 2e-3: each softmax is one-hot, unless two logits lie within a few of each other, where fp32's rounding moves it
    assert rms(grads[2] - expected_grads[2]) < 2e-3


class LargestResult(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_the_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 640
    leaves, targets = inputs(rows=rows, ignored=0.0)
    with LargestResult() as seen:
        reference(leaves, targets, torch.float32)
    assert seen.numel == rows * V  # so the measurement sees what it is to see
    monkeypatch.setattr(loss, "CHUNK_BYTES", 64 * 4 * V)
    with LargestResult() as seen:
        ours(leaves, targets)
    assert seen.numel == max(rows * D, 64 * V) < rows * V  # the hidden states, or a chunk of the smallest size
