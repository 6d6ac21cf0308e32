"""Where the layers live makes no difference: every home gives the resident store's bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.optim import AdamW, Optimizer, Update, clip_coefficient
from gptj_stream.optim.compact import CompactAdamW
from gptj_stream.pretrained import fill_fresh
from gptj_stream.store import FileHome, MemoryHome, ResidentStore, Store, state_parts
from gptj_stream.store.file_home import Owner

if TYPE_CHECKING:
    from conftest import Tiny

CPU = torch.device("cpu")
OWNER = Owner("run", "model", "state", "folder")
OPTIMIZERS = [AdamW(), CompactAdamW(seed=3)]
ids = type


def file_store(
    folder: Path,
    config: ModelConfig,
    optimizer: Optimizer,
    dtype: torch.dtype = torch.float32,
    in_memory: Collection[int] = (),
    owner: Owner = OWNER,
) -> Store:
    layouts = model_layouts(config)
    home = FileHome(
        folder,
        state_parts(layouts, dtype, optimizer),
        gradient_dtype=optimizer.gradient_dtype,
        owner=owner,
        in_memory=in_memory,
    )
    return Store(layouts, home, device=CPU, dtype=dtype, optimizer=optimizer)


def train(
    store: Store,
    config: ModelConfig,
    batches: Callable[[int], Sequence[MicroBatch]],
    steps: Sequence[int],
    kept: int = 0,
) -> list[float]:
    """Losses and gradient norms of these steps, clipped as in training."""
    executor = Executor(config, store, kept_layers=kept)
    numbers: list[float] = []
    for step in steps:
        losses = executor.gradients(batches(step), step)
        norm = store.gradient_norm()
        store.apply(Update(step, 0.01 / step, clip_coefficient(norm, 1.0)), {"step": step})
        numbers += [*losses, norm]
    return numbers


def states(store: Store) -> list[dict[str, Tensor]]:
    return [store.read(layer) for layer in range(len(store.layouts))]


def assert_equal_states(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for name in mine:
            assert torch.equal(mine[name], other[name]), (layer, name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestBitwise:
    @pytest.fixture
    def batches(self, small_config: ModelConfig, tiny: type[Tiny]) -> Callable[[int], list[MicroBatch]]:
        return lambda step: [tiny.batch(small_config, [9, 14], seed=2 * step + i) for i in range(2)]

    @pytest.fixture
    def resident(
        self,
        small_config: ModelConfig,
        dtype: torch.dtype,
        optimizer: Optimizer,
        batches: Callable[[int], list[MicroBatch]],
    ) -> tuple[list[float], list[dict[str, Tensor]]]:
        store = ResidentStore(model_layouts(small_config), device=CPU, dtype=dtype, optimizer=optimizer)
        fill_fresh(store, small_config, seed=0)
        return train(store, small_config, batches, range(1, 11)), states(store)

    @pytest.mark.parametrize("in_memory", [(), (3,), (0, 2), (0, 1, 2, 3)], ids=str)
    def test_ten_steps_from_a_file(
        self,
        in_memory: tuple[int, ...],
        small_config: ModelConfig,
        dtype: torch.dtype,
        optimizer: Optimizer,
        batches: Callable[[int], list[MicroBatch]],
        resident: tuple[list[float], list[dict[str, Tensor]]],
        tmp_path: Path,
    ) -> None:
        store = file_store(tmp_path, small_config, optimizer, dtype, in_memory)
        fill_fresh(store, small_config, seed=0)
        assert train(store, small_config, batches, range(1, 11), kept=len(in_memory) // 2) == resident[0]
        assert_equal_states(states(store), resident[1])

    def test_opened_again_in_the_middle(
        self,
        small_config: ModelConfig,
        dtype: torch.dtype,
        optimizer: Optimizer,
        batches: Callable[[int], list[MicroBatch]],
        resident: tuple[list[float], list[dict[str, Tensor]]],
        tmp_path: Path,
    ) -> None:
        """Closed with updates pending, which are made when the layers are fetched next."""
        store = file_store(tmp_path, small_config, optimizer, dtype)
        fill_fresh(store, small_config, seed=0)
        numbers = train(store, small_config, batches, range(1, 6))
        store.close()
        store = file_store(tmp_path, small_config, optimizer, dtype, in_memory=(1,))
        assert isinstance(store.home, FileHome)
        assert store.home.note == {"step": 5}
        numbers += train(store, small_config, batches, range(6, 11))
        assert numbers == resident[0]
        assert_equal_states(states(store), resident[1])


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=ids)
class TestCuda:
    """Layers cross the bus there and gradients back, on a stream of their own."""

    @pytest.fixture
    def batches(self, small_config: ModelConfig, tiny: type[Tiny]) -> Callable[[int], list[MicroBatch]]:
        return lambda step: [tiny.batch(small_config, [9, 14], seed=2 * step + i) for i in range(2)]

    def test_as_on_the_cpu(
        self,
        cuda: torch.device,
        small_config: ModelConfig,
        optimizer: Optimizer,
        batches: Callable[[int], list[MicroBatch]],
        tmp_path: Path,
    ) -> None:
        layouts = model_layouts(small_config)
        parts = state_parts(layouts, torch.float32, optimizer)
        homes = {
            "host": MemoryHome(parts, device=CPU, gradient_dtype=optimizer.gradient_dtype, pinned=True),
            "file": FileHome(tmp_path, parts, gradient_dtype=optimizer.gradient_dtype, owner=OWNER, pinned=True),
        }
        results = {}
        for name, home in homes.items():
            store = Store(layouts, home, device=cuda, dtype=torch.float32, optimizer=optimizer)
            fill_fresh(store, small_config, seed=0)
            results[name] = train(store, small_config, batches, range(1, 11)), states(store)
        reference = ResidentStore(layouts, device=CPU, dtype=torch.float32, optimizer=optimizer)
        fill_fresh(reference, small_config, seed=0)
        expected = train(reference, small_config, batches, range(1, 11))
        for numbers, state in results.values():
            # fp32 kernels that sum in another order, ten steps of Adam after them; the compact state's rounding adds
            # a 24th bit of each weight, and its bf16 gradients an eighth
            tolerance = 1e-4 if optimizer.gradient_dtype == torch.float32 else 1e-2
            assert numbers == pytest.approx(expected, rel=tolerance)
            assert all(part["weight"].isfinite().all() for part in state)
