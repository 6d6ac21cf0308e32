"""Every form that a GPT-J checkpoint is found in, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_stream.checkpoint.source import SAFETENSORS, Checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.pretrained import load
from gptj_stream.report import Report
from gptj_stream.store import ResidentStore

Weights = dict[str, Tensor]
Writer = Callable[[Path, Weights], None]


def weights(path: Path, tiny: Any, config_file: Path | None = None) -> Weights:
    source = Checkpoint(path, config_file)
    store = ResidentStore(model_layouts(source.config), device=torch.device("cpu"), dtype=torch.float32)
    source.load(store, Report())
    found: Weights = tiny.weights(store)
    return found


def one_bin(folder: Path, tensors: Weights) -> None:
    torch.save(OrderedDict(tensors), folder / "pytorch_model.bin")


def old_bin(folder: Path, tensors: Weights) -> None:
    torch.save(OrderedDict(tensors), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def two_bins(folder: Path, tensors: Weights) -> None:
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def views(folder: Path, tensors: Weights) -> None:
    """All weights as views of one storage."""
    parts = {name: tensor for name, tensor in tensors.items() if tensor.dtype == tensors["lm_head.bias"].dtype}
    large = torch.cat([tensor.flatten() for tensor in parts.values()])
    pieces = large.split([tensor.numel() for tensor in parts.values()])
    seen = {name: piece.view(tensor.shape) for (name, tensor), piece in zip(parts.items(), pieces, strict=True)}
    torch.save(tensors | seen, folder / "pytorch_model.bin")


def safetensors(folder: Path, tensors: Weights) -> None:
    save_file(tensors, folder / SAFETENSORS)


def same(tensors: Weights) -> Weights:
    return tensors


def bare(tensors: Weights) -> Weights:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors: Weights) -> Weights:
    mask = torch.ones(1, 1, 64, 64).tril()
    more = {}
    for layer in range(2):
        more[f"transformer.h.{layer}.attn.bias"] = mask.to(torch.uint8 if layer else torch.bool)
        more[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    return tensors | more


@pytest.mark.parametrize("change", [same, bare, with_buffers])
@pytest.mark.parametrize("write", [one_bin, old_bin, two_bins, views, safetensors])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hugging_face_folders(
    write: Writer,
    change: Callable[[Weights], Weights],
    dtype: torch.dtype,
    checkpoint: Path,
    tiny: Any,
    tmp_path: Path,
) -> None:
    expected = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / SAFETENSORS).items()}
    write(tmp_path, change(expected))
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert Checkpoint(tmp_path).dtype == dtype
    found = weights(tmp_path, tiny)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


@pytest.mark.parametrize("write", [one_bin, old_bin, safetensors])
def test_one_file_with_its_configuration_beside_it_or_named(
    write: Writer, checkpoint: Path, tiny: Any, tmp_path: Path
) -> None:
    expected = load_file(checkpoint / SAFETENSORS)
    write(tmp_path, expected)
    (file,) = tmp_path.iterdir()
    with pytest.raises(UserError, match=r"no config\.json beside it; --config names one"):
        Checkpoint(file)
    found = weights(file, tiny, checkpoint / "config.json")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert Checkpoint(file).config == Checkpoint(checkpoint).config


def test_codegen(tmp_path: Path, tiny: Any) -> None:
    """Logits of transformers' own CodeGen, whose fused projection is in four groups of q, v, k."""
    from transformers import CodeGenConfig, CodeGenForCausalLM  # noqa: PLC0415  (seconds)

    torch.manual_seed(0)
    config = CodeGenConfig(
        vocab_size=101, n_positions=64, n_ctx=64, n_embd=64, n_layer=2, n_head=8, rotary_dim=4, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.1,
    )  # fmt: skip
    model = CodeGenForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    source = Checkpoint(tmp_path)
    assert source.format == "Hugging Face, safetensors, CodeGen"
    assert (source.config.eos_token_id, source.config.resid_pdrop) == (2, 0.1)
    found = weights(tmp_path, tiny)
    ids = torch.randint(101, (1, 30), generator=torch.Generator().manual_seed(1))
    gptj = tiny.oracle(source.config).eval()
    with torch.no_grad():
        for name, parameter in gptj.named_parameters():
            parameter.copy_(found[name])
        ours, theirs = gptj(ids).logits, model(ids).logits
    # the same sums in another order: fp32's rounding
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_evaluate_and_generate_take_a_bin(checkpoint: Path, tmp_path: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name != SAFETENSORS:
            shutil.copy(path, tmp_path)
    one_bin(tmp_path, load_file(checkpoint / SAFETENSORS))
    ids = [1, 2, 3, 4]
    expected = load(checkpoint, precision="fp32").logits(ids)
    assert torch.equal(load(tmp_path, precision="fp32").logits(ids), expected)
    assert torch.equal(load(tmp_path / "pytorch_model.bin", precision="fp32").logits(ids), expected)


Damage = Callable[[Path], None]


def changed(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def with_tensors(change: Callable[[Weights], Weights | None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SAFETENSORS)
        (folder / SAFETENSORS).unlink()
        one_bin(folder, change(tensors) or tensors)

    return damage


def indexed(**files: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / SAFETENSORS).rename(folder / "a.safetensors")

    return damage


def duplicated(folder: Path) -> None:
    indexed(x="a.safetensors", y="b.safetensors")(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


WTE, NORM = "transformer.wte.weight", "transformer.ln_f.bias"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"it has no config\.json, and no shard_0"),
        (lambda folder: (folder / SAFETENSORS).unlink(), r"has no model\.safetensors or pytorch_model\.bin"),
        (lambda folder: (folder / SAFETENSORS).write_text("version https://git-lfs.github.com/spec/v1\n"), r"Git LFS"),
        (lambda folder: (folder / SAFETENSORS).write_bytes(b""), r"damaged or not safetensors"),
        (changed(model_type="gpt2"), r"model_type is 'gpt2'"),
        (changed(n_layer=10**9), r"n_layer is 1000000000"),
        (changed(vocab_size=10**12), r"vocab_size is 1000000000000"),
        (changed(n_layer=3), r"transformer\.h\.2\..* and 7 more are missing; the checkpoint is not whole"),
        (changed(n_layer=1), r"and 7 more are not part of the model that config\.json describes"),
        (changed(vocab_size=350), r"wte\.weight has shape \(\d+, 32\); config\.json makes it \(350, 32\)"),
        (changed(quantization_config={"load_in_8bit": True}), r"the checkpoint is quantized"),
        (with_tensors(lambda w: {n: t for n, t in w.items() if n != NORM}), r"ln_f\.bias is missing"),
        (with_tensors(lambda w: w | {NORM: w[NORM].to(torch.int8)}), r"ln_f\.bias has dtype int8"),
        (with_tensors(lambda w: w | {NORM: w[NORM][:-1]}), r"ln_f\.bias has shape \(31,\)"),
        (with_tensors(lambda w: w | {"a.SCB": torch.ones(3)}), r"a\.SCB is not part of the model"),
        (with_tensors(lambda w: w | {NORM: w[NORM] * torch.nan}), r"ln_f\.bias holds values that are not finite"),
        (with_tensors(lambda w: w | {WTE: w[WTE] / 0}), r"wte\.weight holds values that are not finite"),
        (indexed(x="../a.safetensors"), r"is not the name of a file in this folder"),
        (indexed(x="/etc/passwd"), r"'passwd' is not the name of a file in this folder"),
        (indexed(x="b.safetensors"), r"b\.safetensors: no such file; the index names it"),
        (indexed(), r"it has no weight_map"),
        (with_tensors(lambda w: w | {"ln_f.bias": w[NORM]}), r"ln_f\.bias is there with and without the"),
        (changed(num_attention_heads=3), r"n_embd 32 is not a multiple of n_head 3"),
        (changed(layer_norm_epsilon=float("inf")), r"layer_norm_epsilon is inf"),
        (duplicated, r"is in a\.safetensors as well; the checkpoint is not sound"),
    ],
)
def test_damage(damage: Damage, message: str, checkpoint: Path, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "gptj"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        weights(folder, tiny)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_file_goes_before_an_index(checkpoint: Path, tmp_path: Path) -> None:
    """As it does in transformers."""
    shutil.copytree(checkpoint, tmp_path / "gptj")
    indexed(x="b.safetensors")(tmp_path / "gptj")
    (tmp_path / "gptj" / "a.safetensors").rename(tmp_path / "gptj" / SAFETENSORS)
    assert [path.name for path in Checkpoint(tmp_path / "gptj").files] == [SAFETENSORS]


def test_names_and_ids_that_transformers_takes(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "gptj")
    changed(n_head=None, num_attention_heads=4, eos_token_id=[7, 8], bos_token_id=50256)(tmp_path / "gptj")
    config = Checkpoint(tmp_path / "gptj").config
    assert (config.n_head, config.eos_token_id, config.bos_token_id) == (4, 7, None)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder"):
        Checkpoint(tmp_path / "x")


def test_derivatives_keep_their_shape(tiny: Any, job_config: ModelConfig, tmp_path: Path) -> None:
    """Another vocabulary, another number of layers, an inner width of its own, no ids of special tokens."""
    config = job_config.model_copy(
        update={"vocab_size": 525, "n_layer": 3, "n_inner": 72, "bos_token_id": None, "eos_token_id": None}
    )
    model = tiny.oracle(config)
    model.save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).config == config
    found = weights(tmp_path, tiny)
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())
