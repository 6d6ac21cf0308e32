from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Update

CPU = torch.device("cpu")


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))


def flat_normal(layout: Layout, seed: int) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay_vectors", [False, True])
@pytest.mark.parametrize("module", [layer(), nn.Embedding(6, 4), nn.LayerNorm(3)], ids=["both", "matrix", "vectors"])
def test_equals_torch(module: nn.Module, decay_vectors: bool) -> None:
    """30 steps with changing learning rate and gradient scale, against PyTorch's AdamW in fp64 on scaled gradients."""
    optimizer = AdamW(betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3, decay_vectors=decay_vectors)
    layout = Layout.of("", module)
    weight, state = flat_normal(layout, 0), optimizer.new_state(layout, CPU)
    theirs = {slot.local: view.double().clone().requires_grad_() for slot, view in layout.views(weight)}
    groups = [
        {"params": [p for p in theirs.values() if p.dim() >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.values() if p.dim() < 2], "weight_decay": 0.3 * decay_vectors},
    ]
    torch_adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.8, 0.97), eps=1e-6)
    for step in range(1, 31):
        learning_rate, scale = 0.1 / step, 1.0 if step % 3 else 0.37
        gradient = flat_normal(layout, step)
        for slot, view in layout.views(gradient):
            theirs[slot.local].grad = view.double() * scale
        for group in torch_adamw.param_groups:
            group["lr"] = learning_rate
        torch_adamw.step()
        optimizer.update(layout, weight, gradient, state, Update(step, learning_rate, scale))
    for slot, view in layout.views(weight):
        # 5e-6: 30 updates that each round weights of about 1 to fp32's 6e-8
        torch.testing.assert_close(view.double(), theirs[slot.local].detach(), rtol=0, atol=5e-6)
    for name, moment in state.items():
        for slot, view in layout.views(moment):
            torch.testing.assert_close(
                view.double(), torch_adamw.state[theirs[slot.local]][name], rtol=1e-5, atol=1e-7
            )  # sums of 30 terms in fp32, which may cancel


def test_decay_spares_vectors() -> None:
    """With gradients of 0 the decay is all that happens."""
    layout = Layout.of("", layer())
    optimizer = AdamW(weight_decay=0.1)
    before = flat_normal(layout, 0)
    weight = before.clone()
    optimizer.update(layout, weight, torch.zeros(layout.numel), optimizer.new_state(layout, CPU), Update(1, 0.01, 1.0))
    matrices = layout.matrix_numel
    assert matrices == 35
    torch.testing.assert_close(weight[:matrices], before[:matrices] * 0.999, rtol=2e-7, atol=0)  # one rounding
    assert torch.equal(weight[matrices:], before[matrices:])


def test_new_state_is_zero() -> None:
    layout = Layout.of("", layer())
    state = AdamW().new_state(layout, CPU)
    assert set(state) == {"exp_avg", "exp_avg_sq"}
    for moment in state.values():
        assert torch.equal(moment, torch.zeros(layout.numel))


def test_clipping_to_a_tenth_is_a_gradient_of_a_tenth() -> None:
    layout = Layout.of("", layer())
    optimizer = AdamW()
    results = []
    for factor, scale in ((1.0, 0.125), (0.125, 1.0)):
        weight, state = flat_normal(layout, 0), optimizer.new_state(layout, CPU)
        optimizer.update(layout, weight, flat_normal(layout, 1) * factor, state, Update(1, 0.01, scale))
        results.append((weight, state["exp_avg"], state["exp_avg_sq"]))
    for scaled, small in zip(*results, strict=True):
        assert torch.equal(scaled, small)  # a power of two: exact in fp32
