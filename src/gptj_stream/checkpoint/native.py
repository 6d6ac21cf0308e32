"""A run's resumable state: every layer's weights and moments in fp32, and where the run stood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gptj_stream.errors import UserError
from gptj_stream.files import new_folder, read_json
from gptj_stream.store import Store

STATE = "state.json"


def save_checkpoint(folder: Path, step: int, store: Store, state: dict[str, Any], limit: int) -> Path:
    """Write `folder`/step-N; it appears whole or not at all. Only the newest `limit` checkpoints stay.

    Args:
        state: what else a resumed run needs, as JSON values.
    """
    path = folder / f"step-{step:08}"
    with new_folder(path) as temporary:
        for layer in range(len(store.layouts)):
            file = temporary / f"layer-{layer:03}.safetensors"
            try:
                with store.state(layer) as tensors:
                    save_file(tensors, file)
            except SafetensorError as error:  # the library's word for an OSError
                raise OSError(f"{file}: {error}") from error
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=2))
    for old in checkpoints(folder)[:-limit]:
        shutil.rmtree(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-{'[0-9]' * 8}/{STATE}"))


def checkpoint_step(path: Path) -> int:
    """The step after which a checkpoint was written, from its name."""
    return int(path.name.removeprefix("step-"))


def load_checkpoint(path: Path, store: Store) -> dict[str, Any]:
    """Set the store to the checkpoint's weights and moments; return the rest of its state.

    Raises:
        UserError: a file is missing or damaged, or belongs to another model.
    """
    state = read_json(path / STATE)
    for layer, layout in enumerate(store.layouts):
        file = path / f"layer-{layer:03}.safetensors"
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or missing: {error}; remove {path.name} to use the one before") from None
        with store.state(layer) as expected:
            names = list(expected)
        if tensors.keys() != set(names):
            raise UserError(f"{file}: holds {', '.join(sorted(tensors))}; expected {', '.join(names)}")
        for name, tensor in tensors.items():
            if tensor.shape != (layout.numel,):
                raise UserError(f"{file}: {name} has {tensor.numel()} values; the model's layer has {layout.numel}")
        store.write(layer, tensors)
    return state
