"""The command line: the user's path from text to a model, and the options on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptj_stream import cli
from gptj_stream.evaluate import evaluate
from gptj_stream.generate import generate
from gptj_stream.options import EvaluateOptions, GenerateOptions, TrainOptions, read_yaml

Gptj = Callable[..., Any]


def steps(run: Path) -> list[int]:
    rows = map(json.loads, (run / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if "loss" in row]


def test_the_whole_path(gptj: Gptj, corpus: Path, preset: Path, tmp_path: Path) -> None:
    text, tokenizer, tokens, run = corpus / "text.txt", tmp_path / "tok", tmp_path / "tokens", tmp_path / "run"
    made = gptj("tokenizer", "train", "--data", text, "--output", tokenizer, "--vocab-size", 300)
    assert (made.code, made.out) == (0, f"{tokenizer}: 300 tokens\n")

    prepared = gptj("prepare", "--model", tokenizer, "--data", corpus / "docs.jsonl", "--output", tokens)
    assert prepared.code == 0
    assert prepared.out.startswith("tokens: 100 documents, ")
    assert prepared.out.endswith(" learned\n")
    once_more = gptj("prepare", "--model", tokenizer, "--data", corpus / "docs.jsonl", "--output", tokens)
    assert (once_more.code, once_more.out) == (0, prepared.out)

    trained = gptj(
        "train", "--preset", preset, "--tokenizer", tokenizer, "--data", tokens, "--output", run,
        "--max-steps", 20, "--learning-rate", "1e-2", "--precision", "fp32", "--logging-steps", 5,
    )  # fmt: skip
    assert trained.code == 0
    assert trained.out.startswith(f"{run}: weights of step 20, loss ")
    lines = [line for line in trained.err.splitlines() if line.startswith("train ")]
    assert [line.split("  ")[0] for line in lines] == ["train 5/20", "train 10/20", "train 15/20", "train 20/20"]
    assert not any(character in trained.err for character in "\r\x1b")  # plain lines: there is no terminal

    measured = gptj("evaluate", "--model", run, "--data", corpus / "heldout.jsonl", "--precision", "fp32", "--json")
    assert measured.code == 0
    expected = evaluate(EvaluateOptions(model=run, data=(corpus / "heldout.jsonl",), precision="fp32"))
    assert json.loads(measured.out) == vars(expected)
    table = gptj("evaluate", "--model", run, "--data", corpus / "heldout.jsonl", "--precision", "fp32")
    for number in (f"{expected.loss:.4f}", f"{expected.perplexity:.3f}", f"{expected.target_tokens:,}"):
        assert number in table.out

    written = gptj("generate", "--model", run, "--prompt", "The cat", "A dog", "--max-new-tokens", 8)
    assert written.code == 0
    options = GenerateOptions(model=run, prompt=("The cat", "A dog"), max_new_tokens=8)
    texts = generate(options)
    assert written.out == f"The cat{texts[0]}\nA dog{texts[1]}\n"


def test_generate_json(gptj: Gptj, trained: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Das K"}\n{"prompt": "A dog"}\n', encoding="utf-8")
    given = ("--prompt", "The cat", "--prompt-file", prompts, "--max-new-tokens", 24)
    out = gptj("generate", "--model", trained, *given, "--json").out
    results = [json.loads(line) for line in out.splitlines()]
    expected = generate(GenerateOptions(model=trained, prompt=("The cat", "Das K", "A dog"), max_new_tokens=24))
    assert [result["prompt"] for result in results] == ["The cat", "Das K", "A dog"]
    assert [result["text"] for result in results] == expected
    assert {result["finished"] for result in results} <= {"eos", "length"}


def test_sampling_options_arrive(gptj: Gptj, trained: Path) -> None:
    sampling = (
        "--temperature",
        1,
        "--top-k",
        9,
        "--top-p",
        0.9,
        "--seed",
        4,
        "--max-new-tokens",
        24,
        "--stop",
        "moon",
        "tree",
    )
    written = gptj("generate", "--model", trained, "--prompt", "The cat", *sampling, "--precision", "fp32")
    options = GenerateOptions(
        model=trained,
        prompt=("The cat",),
        temperature=1,
        top_k=9,
        top_p=0.9,
        seed=4,
        max_new_tokens=24,
        stop=("moon", "tree"),
        precision="fp32",
    )
    assert written.out == f"The cat{generate(options)[0]}\n"


def test_a_file_of_options_and_the_command_line_over_it(
    gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {checkpoint}\ndata: {corpus / 'docs.jsonl'}\noutput: {tmp_path / 'a'}\n"
        "max-steps: 9\nlearning_rate: 1e-4\nprecision: fp32\nglobal_batch_size: 4\ndropout: 0.1\n"
    )
    assert gptj("train", "--config", config, "--max-steps", 3, "--learning_rate=2e-4").code == 0
    saved = tmp_path / "a" / "run" / "config.yaml"
    options = TrainOptions.parse(read_yaml(saved))
    assert (options.max_steps, options.learning_rate, options.global_batch_size) == (3, 2e-4, 4)
    assert yaml.safe_load(saved.read_text())["dropout"] == 0.1

    # the saved file makes the same run again
    assert gptj("train", "--config", saved, "--output", tmp_path / "b").code == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    # and goes on with it
    resumed = gptj("train", "--config", saved, "--resume", "--max-steps", 5)
    assert resumed.code == 0
    assert "resumed at step 3" in resumed.err
    assert steps(tmp_path / "a") == [1, 2, 3, 4, 5]
    # which needs no more than its folder
    assert gptj("train", "--output", tmp_path / "a", "--resume", "--max-steps", 6).code == 0
    assert steps(tmp_path / "a") == [1, 2, 3, 4, 5, 6]


def test_switches(gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("decay_vectors: true\noverwrite: true\n")
    run = tmp_path / "run"
    base = ("train", "--model", checkpoint, "--data", corpus / "docs.jsonl", "--output", run, "--max-steps", 1)
    for given, expected in (
        (("--config", config), True),
        (("--config", config, "--no-decay-vectors"), False),
        (("--decay-vectors", "--overwrite"), True),
    ):
        assert gptj(*base, *given).code == 0
        assert yaml.safe_load((run / "run" / "config.yaml").read_text())["decay_vectors"] is expected


def test_resume_names_what_differs(gptj: Gptj, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = ("train", "--model", checkpoint, "--data", corpus / "docs.jsonl", "--output", run)
    assert gptj(*base, "--max-steps", 1).code == 0
    refused = gptj(*base, "--resume", "--seed", 5, "--packing", "none")  # named in the order of their declaration
    assert refused.code == 2
    assert refused.err.startswith(f"gptj: {run}: a resumed run cannot change packing (was concat, now none), seed (was")
    assert refused.err.count("\n") == 1


@pytest.mark.parametrize("name", [*cli.COMMANDS])
def test_help_lists_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([*name.split(), "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    options = cli.COMMANDS[name].options
    for option in options.model_fields:
        assert (option.upper() if option in options.positional else f"--{option.replace('_', '-')}") in text
    assert "--config" in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert all(f"gptj {name} " in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("tokenizer", "unknown command 'tokenizer'; did you mean tokenizer train?"),
        ("tokenizer trai --data x", "unknown command 'tokenizer'; did you mean tokenizer train?"),
        ("xyz", f"unknown command 'xyz'; the commands are {', '.join(cli.COMMANDS)}"),
        ("train --learning-rat 1", "unknown option learning-rat; did you mean learning_rate?"),
        ("train --learning_rat=1", "unknown option learning_rat; did you mean learning_rate?"),
        ("train --max-step 1", "unknown option max-step; did you mean max_steps?"),  # no guessing by prefix
        ("evaluate --temperature 1", "unknown option temperature; the options are model, data"),
        ("train stray", "unexpected argument 'stray'; options are written --name value"),
        ("train --max-steps", "argument --max-steps: expected one argument; gptj train --help lists the options"),
        ("train --learning-rate -1e-5 --model m --data d --output o", "learning_rate is '-1e-5': input should be gre"),
        ("train --learning-rate -.5 --model m --data d --output o", "learning_rate is '-.5': input should be great"),
        ("evaluate --data x", "model"),
    ],
)
def test_mistakes_on_the_command_line(gptj: Gptj, arguments: str, message: str) -> None:
    result = gptj(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("gptj: ")
    assert message in result.err
    assert result.err.count("\n") == 1


def test_traceback_on_request(checkpoint: Path, corpus: Path, tmp_path: Path, gptj: Gptj, monkeypatch: Any) -> None:
    """A mistake of ours is one line, unless more is asked for."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setitem(cli.COMMANDS, "evaluate", cli.Command(EvaluateOptions, broken))
    arguments = ("evaluate", "--model", checkpoint, "--data", corpus)
    assert gptj(*arguments) == (
        1,
        "",
        "gptj: internal error: ZeroDivisionError: two lines (--traceback shows where)\n",
    )
    with pytest.raises(ZeroDivisionError):
        gptj(*arguments, "--traceback")


def test_as_a_program(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """Both ways to start it, with results on standard output and all else on standard error."""
    arguments = ["evaluate", "--model", str(trained), "--data", str(corpus / "heldout.jsonl"), "--json"]
    installed = Path(sys.executable).with_name("gptj")
    for command in ([str(installed)], [sys.executable, "-W", "error", "-m", "gptj_stream"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout)["documents"] == 15
        assert done.stderr.startswith("held-out: 15 documents, ")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early(gptj_process: Callable[..., subprocess.Popen[str]], trained: Path) -> None:
    """As in `gptj generate ... | head -1`."""
    process = gptj_process("generate", "--model", trained, "--prompt", *["The cat"] * 50, "--max-new-tokens", 60)
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(7) == "The cat"
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in {0, 1}  # 0 where all of it was in the pipe already
    assert errors == ""
