"""Options: declared once, validated, and the same from a file, the command line and the saved run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gptj_stream.errors import UserError
from gptj_stream.options import (
    EvaluateOptions,
    GenerateOptions,
    Options,
    PrepareOptions,
    TokenizerOptions,
    TrainOptions,
    read_yaml,
)

TRAIN: dict[str, Any] = {"model": "m", "data": ["d.txt"], "output": "o"}
EVALUATE: dict[str, Any] = {"model": "m", "data": ["d.txt"]}
GENERATE: dict[str, Any] = {"model": "m", "prompt": ["p"]}

ALL: list[tuple[type[Options], dict[str, Any]]] = [
    (TrainOptions, TRAIN | {"learning_rate": 3e-5, "eval_data": ["e.txt", "f.jsonl"], "dropout": 0.1}),
    (PrepareOptions, {"model": "m", "data": ["ä b.txt"], "output": "o"}),
    (TokenizerOptions, {"data": ["d"], "output": "o", "vocab_size": 300}),
    (EvaluateOptions, EVALUATE),
    (GenerateOptions, GENERATE | {"stop": ["\n", "###"], "temperature": 0.7}),
]


@pytest.mark.parametrize(("options", "values"), ALL)
def test_yaml_round_trip(options: type[Options], values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    parsed = options.parse(values)
    path.write_text(parsed.to_yaml(), encoding="utf-8")
    assert options.parse(read_yaml(path)) == parsed
    with pytest.raises(ValidationError, match="frozen"):
        parsed.output = Path("other")  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [options for options, _ in ALL])
def test_every_option_has_a_sentence(options: type[Options]) -> None:
    assert (options.__doc__ or "").strip()
    for name, field in options.model_fields.items():
        assert (field.description or "").rstrip().endswith("."), name


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        # names
        (TrainOptions, TRAIN | {"learning_rat": 1}, "unknown option learning_rat; did you mean learning_rate?"),
        (TrainOptions, TRAIN | {"lr-scheduler-typ": 1}, "unknown option lr-scheduler-typ; did you mean lr_scheduler_t"),
        (EvaluateOptions, EVALUATE | {"zzz": 1}, "unknown option zzz; the options are model, data, sequence_length"),
        # values
        (TrainOptions, TRAIN | {"learning_rate": -1e-5}, "learning_rate is -1e-05: input should be greater than 0"),
        (TrainOptions, TRAIN | {"learning_rate": "fast"}, "learning_rate is 'fast': input should be a valid number"),
        (TrainOptions, TRAIN | {"max_steps": 1.5}, "max_steps is 1.5: input should be a valid integer"),
        (TrainOptions, TRAIN | {"max_steps": 0}, "max_steps is 0: input should be greater than or equal to 1"),
        (TrainOptions, TRAIN | {"packing": "tight"}, "packing is 'tight': input should be 'concat', 'documents' or"),
        (TrainOptions, TRAIN | {"dropout": 1.0}, "dropout is 1.0: input should be less than 1"),
        (TrainOptions, TRAIN | {"resume": "perhaps"}, "resume is 'perhaps': input should be a valid boolean"),
        (TrainOptions, TRAIN | {"data": []}, "data is []"),
        (TrainOptions, TRAIN | {"data": 5}, "data is 5"),
        (TrainOptions, TRAIN | {"device": "gpu"}, "device is 'gpu'"),
        (TrainOptions, {"model": "m", "data": ["d"]}, "output"),
        (GenerateOptions, GENERATE | {"top_p": 0}, "top_p is 0: input should be greater than 0"),
        (GenerateOptions, GENERATE | {"temperature": -1}, "temperature is -1: input should be greater than or equal"),
        (TokenizerOptions, {"data": ["d"], "output": "o", "vocab_size": 256}, "vocab_size is 256"),
        # contradictions
        (TrainOptions, {"data": ["d"], "output": "o"}, "give either --model"),
        (TrainOptions, TRAIN | {"preset": "gpt-j-tiny"}, "model and preset contradict"),
        (TrainOptions, {"preset": "gpt-j-tiny", "data": ["d"], "output": "o"}, "add --tokenizer"),
        (TrainOptions, TRAIN | {"preset": "gpt-j-6"}, "preset is 'gpt-j-6': give one of gpt-j-6b, or a config.json"),
        (TrainOptions, TRAIN | {"max_steps": 5, "epochs": 2}, "max_steps and epochs contradict"),
        (TrainOptions, TRAIN | {"resume": True, "overwrite": True}, "resume and overwrite contradict"),
        (TrainOptions, TRAIN | {"min_learning_rate": 0.1}, "min_learning_rate 0.1 is above the peak"),
        (TrainOptions, TRAIN | {"max_steps": 5, "warmup_steps": 5}, "warmup_steps 5 must be less than max_steps 5"),
        (TrainOptions, TRAIN | {"eval_steps": 5}, "eval_steps 5 needs --eval-data"),
        (GenerateOptions, {"model": "m"}, "nothing to continue: give --prompt TEXT or --prompt-file FILE"),
        (GenerateOptions, GENERATE | {"stop": ["x", ""]}, "a stop string is empty"),
    ],
)
def test_mistakes_are_one_line_that_names_value_and_limit(
    options: type[Options], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        options.parse(values)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: one file.txt\noutput: o\nlearning-rate: 1e-5  # YAML reads a string\nepochs: 2\n")
    options = TrainOptions.parse(read_yaml(path))
    assert options == TrainOptions(
        model=Path("m"), data=(Path("one file.txt"),), output=Path("o"), learning_rate=1e-5, epochs=2
    )
    path.write_text("model: m\nprompt: [a, b]\nstop: END\n")
    generate = GenerateOptions.parse(read_yaml(path))
    assert (generate.prompt, generate.stop) == (("a", "b"), ("END",))
    path.write_text("# nothing yet\n")
    assert read_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"a: [1, 2", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"- a\n- b\n", "expected `option: value` lines, found a list"),
        (b"just text", "expected `option: value` lines, found a str"),
        (b"\xff\xff", "cannot be read"),
    ],
)
def test_bad_yaml_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_yaml(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
