from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Update


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))


def flat_normal(layout: Layout, seed: int) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed))


def new_state(optimizer: AdamW, layout: Layout) -> dict[str, Tensor]:
    """Normal weights, moments at zero."""
    state = {name: torch.zeros(part.numel, dtype=part.dtype) for name, part in optimizer.parts(layout).items()}
    optimizer.set_weights(state, flat_normal(layout, 0))
    return state


@pytest.mark.parametrize("decay_vectors", [False, True])
@pytest.mark.parametrize("module", [layer(), nn.Embedding(6, 4), nn.LayerNorm(3)], ids=["both", "matrix", "vectors"])
def test_equals_torch(module: nn.Module, decay_vectors: bool) -> None:
    """30 steps with changing learning rate and gradient scale, against PyTorch's AdamW in fp64 on scaled gradients."""
    optimizer = AdamW(betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3, decay_vectors=decay_vectors)
    layout = Layout.of("", module)
    state = new_state(optimizer, layout)
    theirs = {slot.local: view.double().clone().requires_grad_() for slot, view in layout.views(state["weight"])}
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
        optimizer.update(0, layout, state, gradient, Update(step, learning_rate, scale))
    for slot, view in layout.views(state.pop("weight")):
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
    state = new_state(optimizer, layout)
    optimizer.update(0, layout, state, torch.zeros(layout.numel), Update(1, 0.01, 1.0))
    weight = state["weight"]
    matrices = layout.matrix_numel
    assert matrices == 35
    torch.testing.assert_close(weight[:matrices], before[:matrices] * 0.999, rtol=2e-7, atol=0)  # one rounding
    assert torch.equal(weight[matrices:], before[matrices:])


def test_clipping_to_a_tenth_is_a_gradient_of_a_tenth() -> None:
    layout = Layout.of("", layer())
    optimizer = AdamW()
    results = []
    for factor, scale in ((1.0, 0.125), (0.125, 1.0)):
        state = new_state(optimizer, layout)
        optimizer.update(0, layout, state, flat_normal(layout, 1) * factor, Update(1, 0.01, scale))
        results.append(state.values())
    for scaled, small in zip(*results, strict=True):
        assert torch.equal(scaled, small)  # a power of two: exact in fp32
