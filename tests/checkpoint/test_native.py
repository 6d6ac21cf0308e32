"""The run's own checkpoints: exact, whole or absent, and few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_stream.checkpoint.native import checkpoint_step, checkpoints, load_checkpoint, save_checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.optim import AdamW
from gptj_stream.store import ResidentStore

CPU = torch.device("cpu")
STATE = {"data": {"consumed_rows": 7}, "progress": {"loss": 0.1, "best_loss": float("inf")}}


def random_store(config: ModelConfig, seed: int) -> ResidentStore:
    store = ResidentStore(model_layouts(config), device=CPU, dtype=torch.float32, optimizer=AdamW())
    generator = torch.Generator().manual_seed(seed)
    for layer in range(len(store.layouts)):
        store.write(layer, {name: torch.randn(t.shape, generator=generator) for name, t in store.read(layer).items()})
    return store


def test_weights_moments_and_state_come_back_to_the_bit(job_config: ModelConfig, tmp_path: Path) -> None:
    saved, other = random_store(job_config, 0), random_store(job_config, 1)
    path = save_checkpoint(tmp_path, 12, saved, STATE, 2)
    assert load_checkpoint(path, other) == {"step": 12, **STATE}
    assert checkpoint_step(path) == 12
    for layer in range(len(saved.layouts)):
        assert saved.read(layer).keys() == {"weight", "exp_avg", "exp_avg_sq"}
        for name, tensor in saved.read(layer).items():
            assert torch.equal(other.read(layer)[name], tensor)


def test_only_the_newest_stay(job_config: ModelConfig, tmp_path: Path) -> None:
    store = random_store(job_config, 0)
    for step in (5, 10, 95, 100):  # 100 sorts before 95 unless the name is padded
        save_checkpoint(tmp_path, step, store, STATE, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000095", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000095", "step-00000100"]


def test_a_checkpoint_that_was_not_finished_does_not_count(job_config: ModelConfig, tmp_path: Path) -> None:
    store = random_store(job_config, 0)
    whole = save_checkpoint(tmp_path, 1, store, STATE, 2)
    for name in (".step-00000002.tmp", "step-00000003"):  # killed while it wrote; killed while it deleted
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer-000.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == [whole]
    again = save_checkpoint(tmp_path, 2, store, STATE, 2)
    assert load_checkpoint(again, random_store(job_config, 1))["step"] == 2
    assert not (tmp_path / ".step-00000002.tmp").exists()


def test_saving_a_step_again_replaces_it(job_config: ModelConfig, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, random_store(job_config, 0), STATE, 1)
    later, read = random_store(job_config, 2), random_store(job_config, 1)
    path = save_checkpoint(tmp_path, 3, later, STATE | {"again": True}, 1)
    assert load_checkpoint(path, read)["again"]
    assert torch.equal(read.read(0)["exp_avg"], later.read(0)["exp_avg"])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_damage_is_named(job_config: ModelConfig, tmp_path: Path) -> None:
    store = random_store(job_config, 0)
    path = save_checkpoint(tmp_path, 1, store, STATE, 1)
    layer = path / "layer-001.safetensors"
    data = layer.read_bytes()

    layer.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"layer-001\.safetensors: damaged or missing.*remove step-00000001"):
        load_checkpoint(path, store)
    layer.unlink()
    with pytest.raises(UserError, match=r"layer-001\.safetensors: damaged or missing"):
        load_checkpoint(path, store)

    layer.write_bytes(data)
    tensors = load_file(layer)
    save_file({"weight": tensors["weight"]}, layer)
    with pytest.raises(UserError, match=r"layer-001\.safetensors: holds weight; expected weight, exp_avg, exp_avg_sq"):
        load_checkpoint(path, store)

    layer.write_bytes(data)
    (path / "state.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"state\.json: not valid JSON"):
        load_checkpoint(path, store)


def test_a_checkpoint_of_another_model_is_refused(job_config: ModelConfig, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, random_store(job_config, 0), STATE, 1)
    wider = job_config.model_copy(update={"n_inner": 96})
    with pytest.raises(UserError, match=r"layer-001\.safetensors: \w+ has \d+ values; the model's layer has \d+"):
        load_checkpoint(path, random_store(wider, 0))
