"""Hugging Face folders: what transformers saves we read to the bit, and what we write transformers reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_stream.checkpoint.folder import INDEX, stored_weights, write_folder
from gptj_stream.checkpoint.source import SAFETENSORS, Checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.data import tokenizer as tokenizer_files
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.pretrained import load
from gptj_stream.report import Report
from gptj_stream.store import ResidentStore

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def oracle(tiny: Any, job_config: ModelConfig) -> GPTJForCausalLM:
    """The model that `checkpoint` holds."""
    return tiny.oracle(job_config).eval()


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> ResidentStore:
    source = Checkpoint(folder)
    store = ResidentStore(model_layouts(source.config), device=torch.device("cpu"), dtype=dtype)
    source.load(store, Report())
    return store


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_transformers_saves(
    *,
    tiny: Any,
    job_config: ModelConfig,
    tmp_path: Path,
    max_shard_size: str,
    dtype: torch.dtype,
) -> None:
    model = tiny.oracle(job_config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert Checkpoint(tmp_path).dtype == dtype
    assert_same_bytes(tiny.weights(opened(tmp_path, dtype)), dict(model.named_parameters()))


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_byte(
    tiny: Any,
    job_config: ModelConfig,
    tmp_path: Path,
    max_shard_size: int,
    dtype: torch.dtype,
) -> None:
    tiny.oracle(job_config).to(dtype).save_pretrained(tmp_path / "in", max_shard_size="30KB")
    source = Checkpoint(tmp_path / "in")
    # read to fp32, as training keeps its weights, and written back
    write_folder(
        tmp_path / "out",
        source.config,
        stored_weights(opened(tmp_path / "in")),
        dtype=source.dtype,
        max_shard_size=max_shard_size,
    )
    assert_same_bytes(stored_tensors(tmp_path / "out"), stored_tensors(tmp_path / "in"))


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 20_000])
def test_transformers_loads_ours_without_a_warning(
    *,
    checkpoint: Path,
    oracle: GPTJForCausalLM,
    tmp_path: Path,
    max_shard_size: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  (seconds)

    write_folder(
        tmp_path / "out",
        Checkpoint(checkpoint).config,
        stored_weights(opened(checkpoint)),
        dtype=torch.float32,
        carried_files=tokenizer_files.files(checkpoint),
        source=checkpoint,
        max_shard_size=max_shard_size,
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not caplog.records
    assert not any(info.values()), info  # missing, unexpected, mismatched keys, errors
    assert type(model) is type(oracle)
    assert_same_bytes(dict(model.named_parameters()), dict(oracle.named_parameters()))
    ids = tokenizer("The old fox sees the moon 🌙.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, oracle(ids).logits)
        # ours sums in another order: fp32's rounding, 1e-7 a sum, through two blocks
        torch.testing.assert_close(
            load(tmp_path / "out", precision="fp32").logits(ids[0]), oracle(ids).logits[0], rtol=1e-4, atol=1e-5
        )


def test_shards_stay_within_their_size_and_the_index_names_them(checkpoint: Path, tmp_path: Path) -> None:
    limit = 20_000
    write_folder(
        tmp_path / "out",
        Checkpoint(checkpoint).config,
        stored_weights(opened(checkpoint)),
        dtype=torch.float32,
        max_shard_size=limit,
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name: file for file, tensors in shards.items() for name in tensors} == index["weight_map"]
    sizes = {file: [tensor.nbytes for tensor in tensors.values()] for file, tensors in shards.items()}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes.values())  # one tensor may be larger by itself
    assert any(len(size) > 1 for size in sizes.values())
    for file in sizes:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened_file:
            assert opened_file.metadata() == {"format": "pt"}  # transformers before 5 refuses a file without it
    assert sorted(sizes) == [f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)]


def test_config_and_generation_config_survive(checkpoint: Path, tmp_path: Path) -> None:
    generation = {"eos_token_id": 5, "max_new_tokens": 7, "do_sample": True}
    source = tmp_path / "in"
    source.mkdir()
    for path in checkpoint.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "generation_config.json").write_text(json.dumps(generation))
    folder = Checkpoint(source)
    write_folder(tmp_path / "out", folder.config, stored_weights(opened(source)), dtype=torch.bfloat16, source=source)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    written = Checkpoint(tmp_path / "out")
    assert written.config == folder.config
    assert written.dtype == torch.bfloat16
    theirs = json.loads((checkpoint / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours["dtype"] == "bfloat16"
    assert {name: ours[name] for name in ModelConfig.model_fields} == {
        name: theirs[name] for name in ModelConfig.model_fields
    }


def test_a_fresh_model_gets_a_generation_config(checkpoint: Path, tmp_path: Path) -> None:
    config = Checkpoint(checkpoint).config
    write_folder(tmp_path / "out", config, stored_weights(opened(checkpoint)), dtype=torch.float32)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}


def test_causal_masks_of_old_checkpoints_are_ignored(checkpoint: Path, tmp_path: Path, tiny: Any) -> None:
    weights = load_file(checkpoint / SAFETENSORS)
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(weights, tmp_path / SAFETENSORS)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert_same_bytes(tiny.weights(opened(tmp_path)), tiny.weights(opened(checkpoint)))


def test_a_config_without_the_newer_keys_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """GPT-J's own config.json has no tie_word_embeddings, and n_inner null."""
    values = json.loads((checkpoint / "config.json").read_text())
    for name in ("tie_word_embeddings", "dtype", "transformers_version"):
        values.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(values | {"n_inner": None, "gradient_checkpointing": False}))
    (tmp_path / SAFETENSORS).write_bytes((checkpoint / SAFETENSORS).read_bytes())
    assert Checkpoint(tmp_path).config == Checkpoint(checkpoint).config


def test_fp16_refuses_what_it_cannot_hold_and_leaves_the_folder_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    config, store = Checkpoint(checkpoint).config, opened(checkpoint)
    write_folder(tmp_path / "out", config, stored_weights(store), dtype=torch.float16)
    before = stored_tensors(tmp_path / "out")
    weight = store.read(0)["weight"]
    weight[0] = 70_000.0  # fp16 ends at 65504
    store.load(0, weight)
    with pytest.raises(UserError, match=r"wte\.weight holds values beyond float16's range; use another dtype"):
        write_folder(tmp_path / "out", config, stored_weights(store), dtype=torch.float16)
    assert_same_bytes(stored_tensors(tmp_path / "out"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_integer_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / SAFETENSORS)
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"].to(torch.int8)
    save_file(weights, tmp_path / SAFETENSORS)
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"transformer\.ln_f\.bias has dtype int8; weights are read in float32"):
        opened(tmp_path)
