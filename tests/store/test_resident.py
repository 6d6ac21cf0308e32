from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Update
from gptj_stream.store import ResidentStore

CPU = torch.device("cpu")
MODULES = (nn.Embedding(6, 4), nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), nn.LayerNorm(5))
LAYOUTS = [Layout.of(f"{i}.", module) for i, module in enumerate(MODULES)]


def normal(layer: int, seed: int) -> Tensor:
    return torch.randn(LAYOUTS[layer].numel, generator=torch.Generator().manual_seed(100 * seed + layer))


def make_store(dtype: torch.dtype = torch.float32, optimizer: AdamW | None = None) -> ResidentStore:
    store = ResidentStore(LAYOUTS, device=CPU, dtype=dtype, optimizer=optimizer)
    for layer in range(len(LAYOUTS)):
        store.write(layer, {"weight": normal(layer, 0)})
    return store


def put(store: ResidentStore, layers: Sequence[int], seed: int) -> list[Tensor]:
    """Hand over a random gradient for each of these layers."""
    gradients = []
    for layer in layers:
        buffer = store.gradient(layer)
        buffer.copy_(normal(layer, seed))
        gradients.append(buffer.clone())
        store.put_gradient(layer, buffer)
    return gradients


@pytest.mark.parametrize("optimizer", [None, AdamW()], ids=["read-only", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_in_the_order_asked_for(dtype: torch.dtype, optimizer: AdamW | None) -> None:
    store = make_store(dtype, optimizer)
    order = [2, 0, 1, 1, 0]
    streamed = [(layer, flat.clone()) for layer, flat in store.stream(order)]
    assert [layer for layer, _ in streamed] == order
    for layer, flat in streamed:
        assert flat.dtype == dtype
        assert torch.equal(flat, normal(layer, 0).to(dtype))


def test_weights_under_an_optimizer_stay_fp32() -> None:
    trained, read_only = make_store(torch.bfloat16, AdamW()), make_store(torch.bfloat16)
    assert torch.equal(trained.read(1)["weight"], normal(1, 0))
    assert torch.equal(read_only.read(1)["weight"], normal(1, 0).bfloat16())
    assert set(trained.read(1)) == {"weight", "exp_avg", "exp_avg_sq"}
    assert set(read_only.read(1)) == {"weight"}


def test_what_is_written_is_read_and_the_rest_stays() -> None:
    store = make_store(optimizer=AdamW())
    store.write(1, {"exp_avg": normal(1, 5)})
    assert torch.equal(store.read(1)["exp_avg"], normal(1, 5))
    assert torch.equal(store.read(1)["weight"], normal(1, 0))
    assert not store.read(1)["exp_avg_sq"].any()
    assert torch.equal(store.read(2)["weight"], normal(2, 0))


def test_writing_copies() -> None:
    store, flat = make_store(), normal(0, 3)
    store.write(0, {"weight": flat})
    flat.zero_()
    assert torch.equal(store.read(0)["weight"], normal(0, 3))


def test_an_interrupted_run_goes_on_bitwise() -> None:
    """State carried to a second store by `read` and `write` is all there is."""
    update = Update(2, 0.01, 0.5)
    first = make_store(optimizer=AdamW())
    put(first, [0, 1, 2], seed=1)
    first.apply(Update(1, 0.01, 1.0))
    second = ResidentStore(LAYOUTS, device=CPU, dtype=torch.float32, optimizer=AdamW())
    for layer in range(3):
        second.write(layer, first.read(layer))
    for store in (first, second):
        put(store, [0, 1, 2], seed=2)
        store.apply(update)
    for layer in range(3):
        assert not torch.equal(first.read(layer)["weight"], normal(layer, 0))
        for name, tensor in first.read(layer).items():
            assert torch.equal(second.read(layer)[name], tensor)


def test_gradient_norm_equals_torch() -> None:
    store = make_store(optimizer=AdamW())
    gradients = put(store, [2, 1, 0], seed=1)
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    expected = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    assert store.gradient_norm() == pytest.approx(expected, rel=1e-6)  # theirs sums in fp32


def test_gradient_norm_does_not_depend_on_the_order() -> None:
    norms = []
    for order in ([0, 1, 2], [2, 0, 1]):
        store = make_store(optimizer=AdamW())
        put(store, order, seed=1)
        norms.append(store.gradient_norm())
    assert norms[0] == norms[1]


def test_gradient_norm_is_of_this_step() -> None:
    store = make_store(optimizer=AdamW())
    assert store.gradient_norm() == 0.0
    put(store, [0, 1, 2], seed=1)
    (last,) = put(store, [1], seed=2)  # again: replaces, does not add
    others = [store.home.fetch_gradient(layer) for layer in (0, 2)]
    expected = torch.cat([last, *others]).double().norm().item()
    assert store.gradient_norm() == pytest.approx(expected, rel=1e-7)  # fp64 both
    store.apply(Update(1, 0.01, 1.0))
    assert store.gradient_norm() == 0.0


def test_apply_updates_every_layer_as_the_optimizer_does() -> None:
    optimizer = AdamW(weight_decay=0.2)
    store = make_store(torch.bfloat16, optimizer)
    expected = [store.read(layer) for layer in range(3)]
    for step in (1, 2, 3):
        update = Update(step, 0.01, 0.3)
        gradients = put(store, [0, 1, 2], seed=step)
        for layer, (layout, gradient, state) in enumerate(zip(LAYOUTS, gradients, expected, strict=True)):
            optimizer.update(layer, layout, state, gradient, update)
        store.apply(update)
    for layer, flat in store.stream(range(3)):
        assert torch.equal(flat, expected[layer]["weight"].bfloat16())
        for name, tensor in expected[layer].items():
            assert torch.equal(store.read(layer)[name], tensor)


def test_apply_leaves_a_layer_without_gradient() -> None:
    store = make_store(optimizer=AdamW())
    put(store, [1], seed=1)
    store.apply(Update(1, 0.01, 1.0))
    assert torch.equal(store.read(0)["weight"], normal(0, 0))
    assert not torch.equal(store.read(1)["weight"], normal(1, 0))
    once = store.read(1)["weight"].clone()
    store.apply(Update(2, 0.01, 1.0))  # the gradient was used up
    assert torch.equal(store.read(1)["weight"], once)
