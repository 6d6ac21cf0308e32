"""Gradients that are sums over tokens, in bf16 on a CPU."""

import pytest
import torch
from torch import Tensor, nn

from gptj_stream.token_sums import Embedding, LayerNorm


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("tokens", "width"), [(8192, 128), (1, 64), (300, 4096)])  # one chunk, and several
def test_layer_norm(tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(tokens, width, generator=generator).bfloat16() for _ in range(2))
    ours, exact = LayerNorm(width).bfloat16(), nn.LayerNorm(width).double()
    with torch.no_grad():
        ours.weight.copy_(1 + 0.1 * torch.randn(width, generator=generator))
        ours.bias.copy_(torch.randn(width, generator=generator))
        exact.weight.copy_(ours.weight)
        exact.bias.copy_(ours.bias)
    x_ours, x_exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out, out_exact = ours(x_ours), exact(x_exact)
    out.backward(grad)
    out_exact.backward(grad.double())
    assert torch.equal(out, nn.functional.layer_norm(x, (width,), ours.weight, ours.bias))
    # results are rounded to bf16 once, half an ulp of 2^-8: 0.2 % on average, here to 0.3 %. A sum in bf16 over 8192
    # tokens is off by 7 %
    for got, want in (
        (x_ours.grad, x_exact.grad),
        (ours.weight.grad, exact.weight.grad),
        (ours.bias.grad, exact.bias.grad),
    ):
        assert got is not None
        assert want is not None
        assert got.dtype == torch.bfloat16
        assert relative_error(got, want) < 0.004


def test_embedding() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(4096, generator=generator) ** 3 * 50).long()  # some tokens are frequent
    grad = torch.randn(4096, 32, generator=generator).bfloat16()
    ours, exact = Embedding(60, 32).bfloat16(), nn.Embedding(60, 32).double()
    out = ours(ids)
    out.backward(grad)
    exact(ids).backward(grad.double())
    assert torch.equal(out, ours.weight[ids])
    assert ours.weight.grad is not None
    assert exact.weight.grad is not None
    assert relative_error(ours.weight.grad, exact.weight.grad) < 0.004  # one rounding to bf16
    assert not ours.weight.grad[50:].any()


def test_fp32_is_pytorchs_own() -> None:
    x = torch.randn(7, 16)
    assert torch.equal(LayerNorm(16)(x), nn.LayerNorm(16)(x))
    ours, theirs = LayerNorm(16), nn.LayerNorm(16)
    for module in (ours, theirs):
        module(x).square().sum().backward()
    assert ours.weight.grad is not None
    assert theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
