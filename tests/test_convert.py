"""gptj convert, verify, inspect: what transformers and CTranslate2 make of the result, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from gptj_stream.checkpoint.source import SAFETENSORS, Checkpoint
from gptj_stream.convert import convert, verify
from gptj_stream.errors import UserError
from gptj_stream.files import claimed_folder
from gptj_stream.options import ConvertOptions, VerifyOptions
from gptj_stream.report import Report


@pytest.fixture(scope="module")
def public(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As GPT-J's own repository has it: one fp32 `pytorch_model.bin`, with masks beside the weights."""
    folder = tmp_path_factory.mktemp("public") / "gpt-j"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != SAFETENSORS:
            shutil.copy(path, folder)
    tensors = load_file(checkpoint / SAFETENSORS)
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("max_shard_size", [1 << 30, 20_000])
def test_transformers_gives_the_same_logits_without_a_warning(
    *,
    dtype: str,
    max_shard_size: int,
    public: Path,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: PLC0415  (seconds)

    output = tmp_path / "out"
    convert(
        ConvertOptions(source=public, output=output, dtype=dtype, max_shard_size=max_shard_size),  # type: ignore[arg-type]
        Report(),
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(output)
        GenerationConfig.from_pretrained(output)
    assert not caplog.records
    assert not any(info.values()), info
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    ids = tokenizer("The old fox sees the moon 🌙.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    card = (output / "README.md").read_text()
    for said in ("source: gpt-j", "pytorch_model.bin", "gptj-stream", dtype):
        assert said in card, said


def test_ctranslate2_generates_the_same_text(trained: Path, tmp_path: Path) -> None:
    """Its own converter, its own arithmetic; our export as it is. It wants a name for every row, as GPT-J has."""
    import ctranslate2  # noqa: PLC0415
    from ctranslate2.converters import TransformersConverter  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(trained, source, ignore=shutil.ignore_patterns("run"))
    words = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    words.add_tokens([f"<|extratoken_{i}|>" for i in range(1, 13)])
    words.save(str(source / "tokenizer.json"))
    convert(ConvertOptions(source=source, output=output), Report())
    TransformersConverter(str(output)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output)
    for prompt in ("The cat sees", "Das Kätzchen", "One fish likes the moon"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = tokenizer.convert_ids_to_tokens(ids[0])
        theirs = generator.generate_batch([tokens], max_length=20, sampling_topk=1, include_prompt_in_result=False)
        ours = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        eos = tokenizer.eos_token_id
        assert theirs[0].sequences_ids[0] == [token for token in ours.tolist() if token != eos]


def test_a_mesh_checkpoint_from_the_command_line(
    gptj: Callable[..., Any], checkpoint: Path, tiny: Any, job_config: Any, tmp_path: Path
) -> None:
    """From shards to a folder that is equal to the original, step and all."""
    from tests.checkpoint.conftest import Mesh  # noqa: PLC0415

    config = job_config.model_copy(update={"vocab_size": 352})
    made = Mesh(tiny.oracle(config), config, 2)
    made.write(tmp_path / "step_7", step=7)
    (tmp_path / "mesh.json").write_text(json.dumps(made.values()))
    result = gptj("convert", tmp_path / "step_7", tmp_path / "out", "--tokenizer", checkpoint, "--dtype", "float32")
    assert result.code == 0, result.err
    assert "step: 7" in (tmp_path / "out" / "README.md").read_text()
    result = gptj("verify", tmp_path / "out", tmp_path / "step_7", "--json")
    assert (result.code, json.loads(result.out)["equal"]) == (0, True)
    result = gptj("inspect", tmp_path / "step_7")
    assert "mesh-transformer-jax, step 7" in result.out
    assert "problems      none" in result.out


class TestVerify:
    def test_formats_and_dtypes_do_not_matter(self, gptj: Callable[..., Any], public: Path, tmp_path: Path) -> None:
        half = tmp_path / "half"
        convert(ConvertOptions(source=public, output=half, dtype="float16"), Report())
        convert(ConvertOptions(source=half, output=tmp_path / "wide", dtype="float32"), Report())
        result = gptj("verify", half, tmp_path / "wide", "--logits")
        assert result.code == 0
        assert result.out.endswith("equal: 25 tensors compared\n")
        assert "logits differ by up to 0\n" in result.out
        result = gptj("verify", public, half)
        assert result.code == 3
        assert result.out.endswith("not equal: 25 tensors compared\n")

    def test_what_is_different_is_named(self, public: Path, checkpoint: Path, tmp_path: Path) -> None:
        other = tmp_path / "other"
        shutil.copytree(checkpoint, other)
        tensors = load_file(other / SAFETENSORS)
        tensors["transformer.h.1.mlp.fc_in.weight"][3, 4] += 0.25
        tensors["transformer.ln_f.bias"][2] = torch.nan
        tensors["lm_head.bias"] = tensors["lm_head.bias"][:-1].clone()
        del tensors["transformer.h.0.ln_1.bias"]
        save_file(tensors, other / SAFETENSORS)
        found = verify(VerifyOptions(first=public, second=other), Report())
        assert not found.equal
        assert len(found.problems) == 1
        assert found.only_first == ["transformer.h.0.ln_1.bias"]
        assert not found.only_second
        assert found.misshapen == {"lm_head.bias": ((352,), (351,))}
        assert found.not_finite == {"transformer.ln_f.bias": (0, 1)}
        different = {name: value for name, value in found.differences.items() if value}
        assert different == {"transformer.h.1.mlp.fc_in.weight": pytest.approx(0.25, abs=1e-6)}

    def test_what_both_lack(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "bad")
        tensors = load_file(checkpoint / SAFETENSORS)
        del tensors["lm_head.bias"]
        save_file(tensors, tmp_path / "bad" / SAFETENSORS)
        found = verify(VerifyOptions(first=tmp_path / "bad", second=tmp_path / "bad"), Report())
        assert not found.equal
        assert "lm_head.bias is missing" in found.problems[0]

    def test_another_configuration(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "other")
        config = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rotary_dim": 2, "resid_pdrop": 0.1}))
        found = verify(VerifyOptions(first=checkpoint, second=tmp_path / "other"), Report())
        assert found.config == {"rotary_dim": (4, 2)}
        assert not found.equal


def test_auto_keeps_what_is_stored(checkpoint: Path, tmp_path: Path) -> None:
    """Halves with norms in fp32 come out in fp32."""
    tensors = load_file(checkpoint / SAFETENSORS)
    shutil.copytree(checkpoint, tmp_path / "mixed")
    mixed = {name: tensor if ".ln_" in name else tensor.half() for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "mixed" / SAFETENSORS)
    convert(ConvertOptions(source=tmp_path / "mixed", output=tmp_path / "out"), Report())
    assert verify(VerifyOptions(first=tmp_path / "mixed", second=tmp_path / "out"), Report()).equal


class TestRefusals:
    def test_output(self, gptj: Callable[..., Any], public: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        result = gptj("convert", public, tmp_path / "out")
        assert (result.code, "exists already; name another folder, or add --overwrite" in result.err) == (2, True)
        assert gptj("convert", public, tmp_path / "out", "--overwrite").code == 0

    @pytest.mark.parametrize(
        ("source", "output", "message"),
        [
            ("models/gpt-j", "", "name a folder of its own"),
            ("models/gpt-j", "/", "name a folder of its own"),
            ("models/gpt-j", ".", "name a folder of its own"),
            ("models/gpt-j", "models", "holds models/gpt-j, which is read"),
            ("models/gpt-j", "models/gpt-j", "holds models/gpt-j, which is read"),
            ("models/gpt-j", "models/gpt-j/pytorch_model.bin", "is no checkpoint folder"),
            ("models/gpt-j", "mine", "is no checkpoint folder, or holds other folders"),
            ("models/gpt-j", "letter.txt", "is no checkpoint folder"),
        ],
    )
    def test_overwrite_takes_no_users_files(
        self, *, source: str, output: str, message: str, gptj: Callable[..., Any], public: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        shutil.copytree(public, tmp_path / "models" / "gpt-j")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        (tmp_path / "letter.txt").write_text("x")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        monkeypatch.chdir(tmp_path)
        result = gptj("convert", source, output, "--overwrite")
        assert (result.code, message in result.err) == (2, True), result.err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_another_process_at_work(self, public: Path, tmp_path: Path) -> None:
        with (
            claimed_folder(tmp_path / ".out.tmp", tmp_path / "out"),
            pytest.raises(UserError, match=r"out: another process is at it"),
        ):
            convert(ConvertOptions(source=public, output=tmp_path / "out"), Report())

    def test_options_that_name_nothing(self, gptj: Callable[..., Any], public: Path, tmp_path: Path) -> None:
        result = gptj("convert", public, tmp_path / "out", "--tokenizer", tmp_path)
        assert (result.code, "holds no tokenizer" in result.err) == (2, True)
        result = gptj("convert", public, tmp_path / "out", "--config", tmp_path / "no.json")
        assert (result.code, "no.json: no such file; --config names" in result.err) == (2, True)

    def test_values_beyond_a_dtype(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "large")
        tensors = load_file(checkpoint / SAFETENSORS)
        tensors["transformer.ln_f.bias"][2] = 1e5
        save_file(tensors, tmp_path / "large" / SAFETENSORS)
        with pytest.raises(UserError, match=r"ln_f\.bias holds values beyond float16's range; use another dtype"):
            convert(ConvertOptions(source=tmp_path / "large", output=tmp_path / "out", dtype="float16"), Report())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]

    def test_damage_found_on_the_way_leaves_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        shutil.copytree(checkpoint, tmp_path / "bad")
        tensors = load_file(checkpoint / SAFETENSORS)
        tensors["transformer.ln_f.bias"][2] = torch.nan
        save_file(tensors, tmp_path / "bad" / SAFETENSORS)
        with pytest.raises(UserError, match=r"bad/model\.safetensors: transformer\.ln_f\.bias holds values"):
            convert(ConvertOptions(source=tmp_path / "bad", output=tmp_path / "out"), Report())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]

    def test_a_missing_tokenizer_is_named(self, gptj: Callable[..., Any], public: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("pytorch_model.bin", "config.json"):
            shutil.copy(public / name, bare)
        result = gptj("convert", bare, tmp_path / "out")
        assert result.code == 0
        assert "has no tokenizer; copy tokenizer.json" in result.err
        assert "none; --tokenizer FOLDER where one is needed" in gptj("inspect", bare).out


def test_a_killed_conversion_leaves_nothing_that_looks_finished(
    gptj_process: Callable[..., subprocess.Popen[str]], tiny: Any, job_config: Any, tmp_path: Path
) -> None:
    wide = job_config.model_copy(update={"n_embd": 512, "n_layer": 8, "n_head": 8})
    tiny.oracle(wide).save_pretrained(tmp_path / "in")
    output = tmp_path / "out"
    process = gptj_process("convert", tmp_path / "in", output)
    while not (tmp_path / ".out.tmp" / SAFETENSORS).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    convert(ConvertOptions(source=tmp_path / "in", output=output), Report())
    assert verify(VerifyOptions(first=tmp_path / "in", second=output), Report()).equal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_inspect_names_what_is_wrong(gptj: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    result = gptj("inspect", checkpoint, "--json")
    values = json.loads(result.out)
    assert values["dtypes"] == {"float32": 25}
    assert values["unnamed_rows"] == 12
    assert not values["problems"]
    shutil.copytree(checkpoint, tmp_path / "bad")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    out = gptj("inspect", tmp_path / "bad").out
    assert "problems      " in out
    assert "are missing; the checkpoint is not whole" in out
    assert Checkpoint(checkpoint).format in out


def test_positional_arguments(gptj: Callable[..., Any], tmp_path: Path) -> None:
    assert "source is required" in gptj("convert").err
    assert "output is required" in gptj("convert", tmp_path).err
    assert "unexpected argument 'c'" in gptj("convert", "a", "b", "c").err
    assert "no such file or folder" in gptj("inspect", tmp_path / "x").err
