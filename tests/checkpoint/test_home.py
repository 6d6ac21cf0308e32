"""A checkpoint's own files as where the layers live."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_stream.checkpoint.home import CheckpointHome
from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.store import ResidentStore, Store

if TYPE_CHECKING:
    from conftest import Tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("in_memory", [(), (1,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_losses_as_resident(
    dtype: torch.dtype, in_memory: tuple[int, ...], checkpoint: Path, tiny: type[Tiny]
) -> None:
    folder = Checkpoint(checkpoint)
    layouts = model_layouts(folder.config)
    resident = ResidentStore(layouts, device=CPU, dtype=dtype)
    for layer, layout in enumerate(layouts):
        flat = torch.empty(layout.numel)
        folder.read_layer(layout, flat)
        resident.load(layer, flat)
    home = CheckpointHome(folder, layouts, dtype=dtype, in_memory=in_memory)
    streamed = Store(layouts, home, device=CPU, dtype=dtype)
    batch = tiny.batch(folder.config, [9, 14])
    expected = Executor(folder.config, resident).token_losses(batch)
    for _ in range(2):  # buffers come back
        assert torch.equal(Executor(folder.config, streamed).token_losses(batch), expected)


def test_a_checkpoint_that_is_not_whole(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["transformer.h.1.ln_1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    folder = Checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"transformer\.h\.1\.ln_1\.bias is missing; the checkpoint is not whole"):
        CheckpointHome(folder, model_layouts(folder.config), dtype=torch.float32)
