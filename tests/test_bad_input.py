"""Whatever is wrong with the input: one clear line, no traceback, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.run_folder import RunFolder

Gptj = Callable[..., Any]
Damage = Callable[[Path], object]


def refused(result: Any, *parts: object, alone: bool = True, code: int = 2) -> None:
    """The last line of standard error says it all; `alone` if nothing had begun that was worth a line before."""
    *before, line = result.err.splitlines()
    assert line.startswith("gptj: ")
    for part in parts:
        assert str(part) in line
    assert not any(text.startswith(("gptj: ", "Traceback", "  File")) for text in before)
    assert not (alone and before)
    assert (result.code, result.out) == (code, "")


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    return folder


@pytest.fixture
def train(gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> Gptj:
    """A training command that would work; options given again replace those of the same name."""

    def run(*arguments: object, **changes: object) -> Any:
        options: dict[str, object] = {
            "model": checkpoint,
            "data": corpus / "docs.jsonl",
            "output": tmp_path / "run",
            "max-steps": 2,
            "precision": "fp32",
        }
        options |= {name.replace("_", "-"): value for name, value in changes.items()}
        given = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        return gptj("train", *given, *arguments)

    return run


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def into_shards(folder: Path) -> None:
    """As two files with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    into_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_an_index(text: str) -> Damage:
    return lambda folder: (
        (folder / "model.safetensors").rename(folder / "model.safetensors.index.json").write_text(text)
    )


FC_IN = "transformer.h.1.mlp.fc_in.bias"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "model: no such file or folder; give a checkpoint"),
    "no config": (lambda m: (m / "config.json").unlink(), "is not a checkpoint folder: it has no config.json"),
    "config cut short": (lambda m: cut(m / "config.json", 0.5), "config.json: not valid JSON"),
    "another architecture": (lambda m: edit_json(m / "config.json", model_type="llama"), "model_type is 'llama'"),
    "no architecture": (lambda m: edit_json(m / "config.json", model_type=None), "model_type is None"),
    "quantized": (lambda m: edit_json(m / "config.json", quantization_config={"bits": 8}), "is quantized"),
    "another activation": (lambda m: edit_json(m / "config.json", activation_function="relu"), "activation_function"),
    "tied": (lambda m: edit_json(m / "config.json", tie_word_embeddings=True), "tie_word_embeddings is True"),
    "odd rotary": (lambda m: edit_json(m / "config.json", rotary_dim=3), "rotary_dim 3 must be even and at most"),
    "no layers": (lambda m: edit_json(m / "config.json", n_layer=0), "n_layer is 0"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has no model.safetensors"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "damaged or not safetensors"),
    "weights cut short": (lambda m: cut(m / "model.safetensors", 0.7), "damaged or not safetensors"),
    "weights not safetensors": (lambda m: (m / "model.safetensors").write_bytes(b"x" * 999), "damaged or not safeten"),
    "missing shard": (without_a_shard, "model-00002-of-00002.safetensors: no such file"),
    "index without a map": (with_an_index('{"metadata": {}}'), "index.json: it has no weight_map"),
    "index of numbers": (with_an_index('{"weight_map": {"a": 1, "b": "c"}}'), "index.json: it has no weight_map"),
    "index cut short": (with_an_index('{"weight_map": {'), "index.json: not valid JSON"),
    "missing tensor": (lambda m: edit_weights(m, lambda w: w.pop(FC_IN)), f"{FC_IN} is missing; the checkpoint is"),
    "missing layer": (
        lambda m: edit_json(m / "config.json", n_layer=3),
        "transformer.h.2.attn.k_proj.weight, transformer.h.2.attn.out_proj.weight, transformer.h.2.attn.q_proj.weight "
        "and 7 more are missing",
    ),
    "extra tensor": (
        lambda m: edit_weights(m, lambda w: w.update({"transformer.wpe.weight": torch.ones(2)})),
        "transformer.wpe.weight is not part of the model",
    ),
    "extra layer": (lambda m: edit_json(m / "config.json", n_layer=1), "more are not part of the model"),
    "wrong shape": (
        lambda m: edit_weights(m, lambda w: w.update({FC_IN: w[FC_IN][:-1].clone()})),
        f"{FC_IN} has shape (127,); config.json makes it (128,)",
    ),
    "transposed": (
        lambda m: edit_weights(m, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].T.contiguous()})),
        "lm_head.weight has shape (32, 352); config.json makes it (352, 32)",
    ),
    "not a number": (
        lambda m: edit_weights(m, lambda w: w[FC_IN].view(-1)[5:6].fill_(float("nan"))),
        f"{FC_IN} holds values that are not finite",
    ),
    "infinite": (
        lambda m: edit_weights(m, lambda w: w["transformer.wte.weight"].view(-1)[5:6].fill_(float("-inf"))),
        "transformer.wte.weight holds values that are not finite",
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer cut short": (lambda m: cut(m / "tokenizer.json", 0.5), "tokenizer files cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoints(
    *, gptj: Gptj, train: Gptj, model: Path, corpus: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    damage(model)
    refused(gptj("evaluate", "--model", model, "--data", corpus / "heldout.jsonl"), tmp_path, message)
    refused(gptj("generate", "--model", model, "--prompt", "The cat"), message)
    # what the headers do not show comes after the data's notes
    result = train(model=model)
    refused(result, message, alone=False)
    if result.err.count("\n") == 1:
        assert not (tmp_path / "run").exists()


def test_sharded_checkpoints_as_such_are_fine(gptj: Gptj, model: Path, checkpoint: Path, corpus: Path) -> None:
    """So that the refusals above are for the damage."""
    into_shards(model)
    results = [
        gptj("evaluate", "--model", m, "--data", corpus / "heldout.jsonl", "--json") for m in (model, checkpoint)
    ]
    assert results[0].code == 0
    assert results[0].out == results[1].out


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SOURCES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("x.txt", None, "x.txt: not found"),
    "empty": ("x.txt", b"", "x.txt: the file is empty (0 bytes)"),
    "unsupported": ("x.docx", b"text", "x.docx: unsupported file type '.docx'"),
    "not UTF-8": ("x.txt", b"ab\xff\xfe", "x.txt: invalid UTF-8 at byte 2"),
    "not JSON": ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2: not valid JSON"),
    "not an object": ("x.jsonl", b'["a"]\n', "x.jsonl:1: a JSON list, not an object"),
    "no field": ("x.jsonl", b'{"title": "a"}\n', "x.jsonl:1: fields are title"),
    "not a string": ("x.jsonl", b'{"text": 5}\n', "x.jsonl:1: text is 5, not a string"),
    "blank lines": ("x.jsonl", b"\n\n", "no documents with text"),
    "empty texts": ("x.jsonl", b'{"text": ""}\n{"prompt": "a", "completion": ""}\n', "2 skipped as empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_bad_data(
    *,
    gptj: Gptj,
    train: Gptj,
    checkpoint: Path,
    corpus: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    refused(gptj("evaluate", "--model", checkpoint, "--data", path), message)
    refused(gptj("prepare", "--model", checkpoint, "--data", path, "--output", tmp_path / "tokens"), message)
    refused(train(data=path), message)
    refused(train(eval_data=path), message, alone=False)  # the training data was read first
    # a mistake in the data is not a run: the same command with the right data works
    assert train("--data", corpus / "docs.jsonl", data=None).code == 0


def test_a_folder_without_data(train: Gptj, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(train(data=tmp_path / "empty"), "no .txt, .md, .jsonl files in this folder")


def test_nothing_left_after_filtering(train: Gptj, corpus: Path, tmp_path: Path) -> None:
    long = {"prompt": "The cat sees", "completion": " the river" * 50}
    data = write(tmp_path / "long.jsonl", json.dumps(long) + "\n")
    refused(train(data=data), "no rows to train on: of 1 documents", "sequence_length 64", alone=False)
    # what it left are the tokens: no run, so nothing stands in the way of the next
    assert train("--long-documents", "split", data=data).code == 0
    refused(
        train(sequence_length=2, long_documents="drop", packing="none", output=tmp_path / "b"), "no rows", alone=False
    )
    refused(train(data=data, output=tmp_path / "b"), "other source files; use another --output or --overwrite")
    assert train("--overwrite", "--long-documents", "split", data=data, output=tmp_path / "b").code == 0


def test_tokens_out_of_the_models_range(
    *, gptj: Gptj, train: Gptj, checkpoint: Path, model: Path, corpus: Path, tmp_path: Path
) -> None:
    """A tokenizer with more tokens than the model has rows."""
    tokenizer = Tokenizer.load(checkpoint)
    small = tokenizer.vocab_size - 40
    edit_json(model / "config.json", vocab_size=small, bos_token_id=0, eos_token_id=0)
    edit_weights(
        model,
        lambda w: w.update(
            {n: w[n][:small].clone() for n in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")}
        ),
    )
    message = f"is out of range of the model's vocabulary of {small}"
    refused(train(model=model), "token id", message, alone=False)
    refused(gptj("evaluate", "--model", model, "--data", corpus / "heldout.jsonl"), message, alone=False)
    text = tokenizer.decode([tokenizer.vocab_size - 2])
    assert len(tokenizer.encode(text)) == 1
    refused(gptj("generate", "--model", model, "--prompt", text), f"token id {tokenizer.vocab_size - 2}", message)
    # tokens prepared with a tokenizer that is not the model's
    assert gptj("tokenizer", "train", "--data", corpus, "--output", tmp_path / "tok", "--vocab-size", 500).code == 0
    tokens = tmp_path / "tokens"
    assert gptj("prepare", "--model", tmp_path / "tok", "--data", corpus, "--output", tokens).code == 0
    refused(train(data=tokens), "prepared with another tokenizer than the model's; prepare it again")


def test_damaged_prepared_data(gptj: Gptj, train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    data = corpus / "docs.jsonl"
    assert gptj("prepare", "--model", checkpoint, "--data", data, "--output", tokens).code == 0
    cut(tokens / "tokens.bin", 0.5)
    refused(train(data=tokens), "tokens.bin: has", "prepare the data again with --overwrite")
    refused(train("--data", data, data=tokens), "2 data sources, one of them prepared")


OPTIONS: dict[str, tuple[str, str]] = {
    "negative rate": ("--learning-rate -1", "learning_rate is '-1': input should be greater than 0"),
    "negative small rate": ("--learning-rate -1e-5", "learning_rate is '-1e-5': input should be greater than 0"),
    "warm-up too long": ("--warmup-steps 2", "warmup_steps 2 must be less than max_steps 2"),
    "too long for the model": ("--sequence-length 65", "sequence_length 65 is longer than the model's 64 positions"),
    "no such device": ("--device cuda:99", "device is 'cuda:99': this machine has"),
    "no device at all": ("--device cuda:99999", "device is 'cuda:99999': string should match"),
    "endless": ("--epochs inf --max-steps 0", "max_steps is '0': input should be greater than or equal to 1"),
    "more steps than anyone has time for": (
        "--max-steps 99999999999",
        "input should be less than or equal to 1000000000",
    ),
    "unknown preset": ("--preset gpt-j-tiy", "preset is 'gpt-j-tiy': give one of gpt-j-tiny"),
    "both beginnings": ("--preset gpt-j-tiny", "model and preset contradict each other: give one of them"),
    "unknown option": ("--epoch 1", "unknown option epoch; did you mean epochs?"),
    "contradiction": ("--epochs 1", "max_steps and epochs contradict each other"),
    "resume nothing": ("--resume", "holds no run to resume; leave --resume out to start one"),
    "missing options file": ("--config no.yaml", "no.yaml: cannot be read"),
    "eval without data": ("--eval-steps 2", "eval_steps 2 needs --eval-data"),
}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(train: Gptj, tmp_path: Path, arguments: str, message: str) -> None:
    refused(train(*arguments.split()), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: [1", "run.yaml: not valid YAML"),
        ("- 1\n- 2\n", "run.yaml: expected `option: value` lines, found a list"),
        ("learning_rate: fast\n", "learning_rate is 'fast': input should be a valid number"),
        ("packing: 3\n", "packing is 3: input should be 'concat'"),
        ("resume: maybe\n", "resume is 'maybe': input should be a valid boolean"),
        ("learning_rte: 1\n", "unknown option learning_rte; did you mean learning_rate?"),
        ("eval_data: {a: 1}\n", "eval_data is {'a': 1}: input should be a valid tuple"),
        ("dropout: [0.1]\n", "dropout is [0.1]: input should be a valid number"),
    ],
)
def test_bad_option_files(train: Gptj, tmp_path: Path, text: str, message: str) -> None:
    refused(train("--config", write(tmp_path / "run.yaml", text)), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(gptj: Gptj, train: Gptj, checkpoint: Path) -> None:
    message = "device is 'cuda': this machine has 0 CUDA devices; use cpu or auto"
    refused(train(device="cuda"), message)
    refused(gptj("generate", "--model", checkpoint, "--prompt", "a", "--device", "cuda"), message)


def test_warm_up_longer_than_the_epochs(train: Gptj) -> None:
    result = train("--epochs", 1, "--warmup-steps", 50, max_steps=None)
    refused(result, "warmup_steps 50 must be less than the run's", alone=False)


def test_more_memory_than_there_is(
    *, gptj: Gptj, train: Gptj, model: Path, preset: Path, tokenizer_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """Refused before anything is allocated or written: 10^13 parameters."""
    for path in (preset, model / "config.json"):
        shutil.copy(path, tmp_path / "giant.json")
        edit_json(tmp_path / "giant.json", n_embd=2**17, n_layer=50, n_head=64)
        values = json.loads((tmp_path / "giant.json").read_text())
        parameters = values["vocab_size"] * (2 * 2**17 + 1) + 50 * (12 * 2**34 + 7 * 2**17) + 2 * 2**17
        if path == preset:
            result = train(model=None, preset=tmp_path / "giant.json", tokenizer=tokenizer_folder)
            needed = "(file store, compact state) needs "
            words = "GiB are free; the least at this --sequence-length is --memory ", "GiB of disk, with --micro"
        else:
            shutil.copy(tmp_path / "giant.json", path)
            result = gptj("evaluate", "--model", model, "--data", corpus / "docs.jsonl", "--precision", "fp32")
            needed = f"are 4 bytes each, {4 * parameters / 2**30:.1f} GiB in all; "
            words = "even layer by layer", "are free; raise --memory or --device-memory, or use a smaller model"
        refused(result, f"{parameters:,} parameters", needed, *words)
    assert not (tmp_path / "run").exists()


def test_budgets(gptj: Gptj, train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    refused(train(memory="10MiB"), "needs", "GiB of memory, 0.0 GiB are allowed; the least at this", "is --memory ")
    refused(gptj("plan", "--model", checkpoint, "--memory", "10MiB"), "GiB of memory, 0.0 GiB are allowed")
    refused(train(memory="lots"), "'lots' is not a size: write it as 20GiB or 512MiB")
    refused(train(memory="0"), "memory is '0': input should be greater than 0")
    refused(train(store="fil"), "store is 'fil': give one of file, or a path such as ./fil")
    arguments = ("--model", checkpoint, "--data", corpus / "docs.jsonl", "--memory", "10MiB")
    refused(gptj("evaluate", *arguments), "even layer by layer they need", "raise --memory")
    assert not (tmp_path / "run").exists()


def test_a_budget_that_the_message_names_is_enough(train: Gptj) -> None:
    result = train(memory="10MiB", store="file")
    least = result.err.partition("is --memory ")[2].partition(",")[0]
    result = train(memory=least, store="file", micro_batch_size=1, global_batch_size=1)
    assert result.code == 0, result.err


def test_where_a_store_cannot_be(train: Gptj, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(train(store=tmp_path / "file" / "store"), "cannot be made there", "file is a file; use another --store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "state.bin").write_text("somebody's")
    refused(
        train(store=tmp_path / "store"), "holds files that are not a store's; give --store an empty or a new folder"
    )
    assert (tmp_path / "store" / "state.bin").read_text() == "somebody's"
    assert not (tmp_path / "run").exists()


def test_a_store_of_another(train: Gptj, preset: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert train(store=store, optimizer_state="fp32").code == 0
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    edit = tmp_path / "other.json"
    shutil.copy(preset, edit)
    edit_json(edit, n_layer=3)
    other = {"model": None, "preset": edit, "tokenizer": tokenizer_folder, "output": tmp_path / "other"}
    result = train(store=store, optimizer_state="fp32", **other)
    refused(result, store, "of another run", tmp_path / "run", "GPT-J of 2 blocks", "here GPT-J of 3 blocks")
    result = train(store=store, optimizer_state="compact", output=tmp_path / "third")
    refused(result, "optimizer_state fp32, here compact", "use another --store, or remove it if that run is not needed")
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    # a run that is overwritten gives its store up
    assert train("--overwrite", store=store, optimizer_state="compact").code == 0
    edit_json(store / "store.json", format=99)
    refused(train("--resume", max_steps=3, store=None), "a store of format 99; this version reads format 1")


def test_a_store_that_is_in_use(train: Gptj, gptj_process: Any, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = (
        "--model",
        checkpoint,
        "--data",
        corpus / "docs.jsonl",
        "--output",
        tmp_path / "first",
        "--store",
        store,
    )
    process = gptj_process("train", *arguments, "--max-steps", 100_000)
    deadline = time.monotonic() + 60
    while not (store / "gradients.bin").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    refused(
        train("--resume", output=tmp_path / "first", store=None, max_steps=None, data=None, model=None, precision=None),
        store,
        "is in use by another process",
        alone=False,
    )
    process.kill()
    process.communicate()


def without(name: str) -> Damage:
    return lambda store: (store / name).unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda store: cut(store / "store.json", 0.5), "store.json: not valid JSON"),
        (
            lambda store: edit_json(store / "store.json", update={"step": 1}),
            "store.json: damaged (update.learning_rate",
        ),
        (lambda store: edit_json(store / "store.json", layers=["a"]), "store.json: damaged (layers.0"),
        (lambda store: edit_json(store / "store.json", layers=[99]), "store.json: damaged (layers)"),
        (
            lambda store: cut(store / "state.bin", 0.9),
            "state.bin has",
        ),
        (lambda store: cut(store / "gradients.bin", 0.9), "gradients.bin has"),
        (without("gradients.bin"), "gradients.bin is not there"),
        (without("store.json"), "store's; give --store an empty"),
        (shutil.rmtree, "the run's store is not there; mount its disk, or begin again with --overwrite"),
        (
            lambda store: (store / "state.bin").write_bytes(bytes((store / "state.bin").stat().st_size)),
            "layer 0 is not there; the file is damaged",
        ),
    ],
)
def test_a_damaged_store(damage: Damage, words: str, train: Gptj, tmp_path: Path) -> None:
    assert train(store="file").code == 0
    damage(tmp_path / "run" / "run" / "store")
    refused(train("--resume", max_steps=3, store=None), words, alone=False)


def test_a_run_that_was_moved_with_its_store(train: Gptj, tmp_path: Path) -> None:
    assert train(store="file").code == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    result = train("--resume", max_steps=3, store=None, output=tmp_path / "moved")
    assert result.code == 0, result.err
    assert "resumed at step 2" in result.err


def test_prompts(gptj: Gptj, checkpoint: Path, tmp_path: Path) -> None:
    generate = ("generate", "--model", checkpoint)
    refused(gptj(*generate), "nothing to continue: give --prompt TEXT or --prompt-file FILE")
    refused(gptj(*generate, "--prompt", "The cat " * 99), "tokens exceed the model's 64 positions")
    refused(gptj(*generate, "--prompt", "The cat", "--max-new-tokens", 63), "and 63 new ones exceed the model's 64")
    for text, message in (
        (None, "p.jsonl: cannot be read"),
        ("", "p.jsonl: it holds no prompt"),
        (" \n\n", "p.jsonl: it holds no prompt"),
        ('{"prompt": "a"}\nThe cat\n', "p.jsonl:2: not valid JSON"),
        ('{"question": "a"}\n', "p.jsonl:1: expected an object with a `prompt` (or `text`) that is a string"),
        ('["a"]\n', "p.jsonl:1: expected an object"),
        (b"\xff", "p.jsonl: cannot be read"),
    ):
        if text is not None:
            write(tmp_path / "p.jsonl", text)
        refused(gptj(*generate, "--prompt-file", tmp_path / "p.jsonl"), message)


def test_output_that_cannot_be(gptj: Gptj, train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "file", "mine")
    refused(train(output=file), "file is a file; --output names a folder")
    refused(train(output=file / "run"), "run: cannot be made (Not a directory); use another --output")
    data = ("--data", corpus / "docs.jsonl")
    refused(gptj("prepare", "--model", checkpoint, *data, "--output", file), "--output names a folder")
    refused(gptj("tokenizer", "train", *data, "--output", file), "file is a file; --output names a folder")
    # the system's own words, where there is nothing to add
    refused(gptj("prepare", "--model", checkpoint, *data, "--output", file / "x"), "[Errno", file)
    refused(gptj("tokenizer", "train", *data, "--output", file / "x"), "[Errno", file)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no files")
def test_output_on_a_read_only_place(train: Gptj) -> None:
    refused(train(output="/proc/run"), "/proc/run: cannot be made", "use another --output")


def test_an_output_folder_in_use(gptj: Gptj, train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train().code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(train(), "already holds a run; add --resume to go on or --overwrite to delete it")
    refused(train("--overwrite", model=run), f"--overwrite would delete {run}, which the run reads")
    refused(train("--overwrite", data=tmp_path / "typo.txt"), "typo.txt: not found")
    refused(train("--overwrite", learning_rate=-1), "learning_rate is '-1'")
    refused(train("--overwrite", "--resume"), "resume and overwrite contradict each other")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write(foreign / "thesis.txt", "years")
    data = ("--data", corpus / "docs.jsonl", "--output", foreign)
    refused(train("--overwrite", output=foreign), "holds files that are not a run's; use another --output")
    refused(gptj("prepare", "--model", checkpoint, *data, "--overwrite"), "holds files that are not a prepared dataset")
    refused(gptj("tokenizer", "train", *data), "holds files already; use another --output")
    assert [path.read_text() for path in foreign.iterdir()] == ["years"]


def test_prepared_data_is_not_replaced_unasked(gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    prepare = ("prepare", "--model", checkpoint, "--output", tokens, "--data")
    assert gptj(*prepare, corpus / "docs.jsonl").code == 0
    refused(gptj(*prepare, corpus / "pairs.jsonl"), "holds data prepared from other source files; use another --output")
    assert "100 documents" in gptj(*prepare, corpus / "docs.jsonl").out
    assert "60 documents" in gptj(*prepare, corpus / "pairs.jsonl", "--overwrite").out


def test_a_loss_that_is_not_finite(train: Gptj, model: Path, tmp_path: Path) -> None:
    """The weights are numbers, but their products are not."""
    edit_weights(model, lambda w: w["lm_head.weight"].fill_(3e38))
    message = (
        "step 1: the loss of micro-batch 1 of 4 is not finite (sequences from 0 on in the data's order); the state"
    )
    refused(train(model=model), message, "lower --learning-rate and --resume", alone=False)
    assert RunFolder(tmp_path / "run").metrics.read_text() == ""
    refused(train("--resume", "--learning-rate", "1e-9", model=model), message, alone=False)


def test_damaged_resume_state(train: Gptj, tmp_path: Path) -> None:
    assert train(save_steps=1).code == 0
    run = RunFolder(tmp_path / "run")
    layer = run.checkpoints / "step-00000002" / "layer-001.safetensors"
    cut(layer, 0.5)
    refused(train("--resume", max_steps=3), layer, "damaged or missing", "remove step-00000002 to use", alone=False)
    shutil.rmtree(layer.parent)  # as it says
    resumed = train("--resume", max_steps=3)
    assert resumed.code == 0
    assert "resumed at step 1" in resumed.err
    run.config.write_text("model: [")
    refused(train("--resume"), "config.yaml: not valid YAML")


def started(process: subprocess.Popen[str], run: RunFolder) -> None:
    """Wait for the first checkpoint."""
    deadline = time.monotonic() + 60
    while not list(run.checkpoints.glob("step-*/state.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_interrupted_from_the_keyboard(
    gptj_process: Callable[..., subprocess.Popen[str]], train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    options = ("--model", checkpoint, "--data", corpus / "docs.jsonl", "--output", run.root, "--precision", "fp32")
    process = gptj_process("train", *options, "--max-steps", 100_000, "--save-steps", 5, "--learning-rate", "1e-3")
    started(process, run)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    *before, line = err.splitlines()
    assert line == "gptj: interrupted; `gptj train --output RUN --resume` goes on from a run's newest checkpoint"
    assert not any(text.startswith(("gptj: ", "Traceback")) for text in before)
    assert not list(run.internal.rglob(".*.tmp"))

    rows = run.metrics.read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, len(rows) + 1))
    done = max(int(path.name.removeprefix("step-")) for path in run.checkpoints.iterdir())
    resumed = train("--resume", max_steps=done + 2)
    assert resumed.code == 0
    assert f"resumed at step {done}" in resumed.err


def test_a_full_disk(train: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    """Here a limit on a file's size: the checkpoint cannot be written. The run goes on once there is room."""
    run = RunFolder(tmp_path / "run")
    options = ["--model", checkpoint, "--data", corpus / "docs.jsonl", "--output", run.root, "--max-steps", 2]
    command = [sys.executable, "-m", "gptj_stream", "train", *map(str, options), "--precision", "fp32"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"gptj: {run.checkpoints}")  # which file, and not that it is our mistake
    assert "File too large" in last
    assert not list(run.checkpoints.iterdir())
    assert not (run.root / "config.json").exists()
    assert train("--resume").code == 0


def test_overwriting_waits_until_the_new_run_can_start(train: Gptj, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train().code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    bad = write(tmp_path / "bad.jsonl", '{"txt": "no such field"}\n')
    refused(train("--overwrite", data=bad), "bad.jsonl:1: fields are txt")
    refused(train("--overwrite", "--warmup-steps", 9, max_steps=None), "warmup_steps 9 must be less", alone=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def test_output_inside_the_data(train: Gptj, corpus: Path) -> None:
    refused(train(data=corpus, output=corpus / "run"), "lies inside the data folder")
    assert not (corpus / "run").exists()


def test_tokens_into_the_present_folder(
    gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", corpus / "docs.jsonl")
    refused(gptj("prepare", "--model", checkpoint, *data, "--output", "."), ".: is the folder this runs in")


@pytest.mark.parametrize("value", ["[" * 200_000, "9" * 5_000], ids=["nesting", "digits"])
def test_json_beyond_limits(train: Gptj, gptj: Gptj, model: Path, tmp_path: Path, value: str) -> None:
    line = f'{{"text": {value}'
    refused(train(data=write(tmp_path / "deep.jsonl", line + "}\n")), "deep.jsonl:1: ")
    prompts = write(tmp_path / "prompts.jsonl", line + "}\n")
    refused(gptj("generate", "--model", model, "--prompt-file", prompts), "prompts.jsonl:1: not valid JSON")
    write(model / "config.json", line + "}")
    refused(train(model=model), "config.json: not valid JSON")


def test_damaged_state_of_a_checkpoint(train: Gptj, tmp_path: Path) -> None:
    assert train(save_steps=1).code == 0
    state = RunFolder(tmp_path / "run").checkpoints / "step-00000002" / "state.json"
    state.write_text("{}")
    refused(train("--resume", max_steps=3), "state.json is damaged; remove step-00000002", alone=False)
    (state.parent.parent / "step-foo").mkdir()
    (state.parent.parent / "step-foo" / "state.json").write_text("{}")
    shutil.rmtree(state.parent)
    assert train("--resume", max_steps=3).code == 0


def test_resuming_needs_no_sources(train: Gptj, corpus: Path, tmp_path: Path) -> None:
    """The run has its tokens; the files they were made from may change or go."""
    source = tmp_path / "source.jsonl"
    shutil.copyfile(corpus / "docs.jsonl", source)
    assert train(data=source).code == 0
    source.unlink()
    assert train("--resume", data=source, max_steps=3).code == 0
