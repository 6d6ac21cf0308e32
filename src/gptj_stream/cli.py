"""The command line: a parser for every job, built from the job's options."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import torch
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from gptj_stream.convert import convert, inspect, verify
from gptj_stream.data.tokenizer import add_tokens
from gptj_stream.errors import UserError
from gptj_stream.evaluate import evaluate
from gptj_stream.generate import continue_prompts, read_prompts
from gptj_stream.job import plan_run
from gptj_stream.options import (
    AddTokenOptions,
    ConvertOptions,
    EvaluateOptions,
    GenerateOptions,
    InspectOptions,
    Options,
    PlanOptions,
    PrepareOptions,
    TokenizerOptions,
    TrainOptions,
    VerifyOptions,
    read_yaml,
    unknown_option,
)
from gptj_stream.plan import described
from gptj_stream.prepare import described as described_tokens
from gptj_stream.prepare import prepare, train_bpe
from gptj_stream.pretrained import open_model
from gptj_stream.report import ConsoleReport
from gptj_stream.run_folder import RunFolder
from gptj_stream.train import train


@dataclass(frozen=True)
class Command:
    options: type[Options]
    run: Callable[..., int | None]  # (options), or (options, json) where `json` is set; the exit code, if not 0
    json: bool = False


def _train(options: TrainOptions) -> None:
    result = train(options, ConsoleReport())
    print(f"{result.output}: weights of step {result.exported_step}, loss {result.loss:.4f} at step {result.step}")


def _prepare(options: PrepareOptions) -> None:
    dataset = prepare(options, ConsoleReport())
    print(described_tokens(dataset))


def _train_bpe(options: TokenizerOptions) -> None:
    tokenizer = train_bpe(options, ConsoleReport())
    print(f"{options.output}: {tokenizer.vocab_size:,} tokens")


def _evaluate(options: EvaluateOptions, as_json: bool) -> None:
    result = evaluate(options, ConsoleReport())
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table("loss", "perplexity", "bits per byte", "target tokens", "bytes", "documents")
    table.add_row(
        f"{result.loss:.4f}",
        f"{result.perplexity:.3f}",
        f"{result.bits_per_byte:.4f}",
        f"{result.target_tokens:,}",
        f"{result.text_bytes:,}",
        f"{result.documents:,}",
    )
    Console().print(table)


def _generate(options: GenerateOptions, as_json: bool) -> None:
    """Text appears as it is produced: the first unfinished prompt's at once, the others' when theirs is the turn."""
    prompts = read_prompts(options)
    model = open_model(options, ConsoleReport())
    texts = [""] * len(prompts)
    reasons: dict[int, str] = {}
    showing = 0  # the prompt whose text is appearing
    shown = 0  # how many characters of its prompt and text have
    for piece in continue_prompts(prompts, options, model):
        texts[piece.index] += piece.text
        if piece.finished:
            reasons[piece.index] = piece.finished
        while showing < len(prompts):
            prompt, text, reason = prompts[showing], texts[showing], reasons.get(showing)
            if not as_json:
                print((prompt + text)[shown:], end="\n" if reason else "", flush=True)
                shown = len(prompt + text)
            elif reason:
                print(json.dumps({"prompt": prompt, "text": text, "finished": reason}), flush=True)
            if not reason:
                break
            showing, shown = showing + 1, 0


def _plan(options: PlanOptions) -> None:
    print(described(*plan_run(options, ConsoleReport())))


def _convert(options: ConvertOptions) -> None:
    done = convert(options, ConsoleReport())
    kind = str(done.dtype).removeprefix("torch.")
    print(f"{done.output}: {done.config.parameters:,} parameters in {kind}, {done.nbytes / 1e9:,.2f} GB")


def _inspect(options: InspectOptions, as_json: bool) -> None:
    found = inspect(options)
    if as_json:
        values = asdict(found) | {"path": str(found.path), "config": found.config.model_dump()}
        print(json.dumps(values))
        return
    config = found.config
    rows = {
        "format": found.format + (f", step {found.step:,}" if found.step is not None else ""),
        "files": f"{found.files}, {found.nbytes / 1e9:,.2f} GB",
        "parameters": f"{config.parameters:,}",
        "shape": f"{config.n_layer} blocks of {config.n_embd}, {config.n_head} heads of {config.head_dim}, "
        f"{config.rotary_dim} of them rotary, feed-forward {config.inner_dim}, {config.n_positions} positions",
        "dtypes": ", ".join(f"{kind} ({count} tensors)" for kind, count in found.dtypes.items()),
        "buffers": f"{found.buffers}, left out" if found.buffers else "",
        "vocabulary": f"{config.vocab_size:,} rows",
        "tokenizer": found.tokenizer or "none; --tokenizer FOLDER where one is needed",
        "spare tokens": f"{found.spare_tokens} named <|extratoken_N|>" if found.spare_tokens else "",
        "unnamed rows": f"{found.unnamed_rows:,}" if found.unnamed_rows > 0 and found.tokenizer else "",
        "problems": "; ".join(found.problems) or "none",
    }
    for what, value in rows.items():
        if value:
            print(f"  {what:<13} {_plain(value)}")


def _verify(options: VerifyOptions, as_json: bool) -> int:
    found = verify(options, ConsoleReport())
    if as_json:
        print(json.dumps(asdict(found) | {"equal": found.equal}))
        return 0 if found.equal else NOT_EQUAL
    for name, (ours, theirs) in found.config.items():
        print(f"  {name} is {ours} and {theirs}")
    for path, names in ((options.first, found.only_first), (options.second, found.only_second)):
        for name in names:
            print(f"  {_plain(name)} is only in {path}")
    for name, shapes in found.misshapen.items():
        print(f"  {_plain(name)} has shapes {shapes[0]} and {shapes[1]}")
    for name, (first, second) in found.not_finite.items():
        print(f"  {_plain(name)}: {first:,} and {second:,} values are not finite")
    for problem in found.problems:
        print(f"  {_plain(problem)}")
    worst = sorted(((value, name) for name, value in found.differences.items() if value), reverse=True)
    for value, name in worst[:_SHOWN]:
        print(f"  {_plain(name)} differs by up to {value:.3g}")
    if len(worst) > _SHOWN:
        print(f"  {len(worst) - _SHOWN} more tensors differ by less (--json lists all)")
    if found.logits is not None:
        print(f"  logits differ by up to {found.logits:.3g}")
    print(f"{'equal' if found.equal else 'not equal'}: {len(found.differences):,} tensors compared")
    return 0 if found.equal else NOT_EQUAL


def _add_tokens(options: AddTokenOptions) -> None:
    for name, token_id in add_tokens(options.folder, options.tokens).items():
        print(f"{token_id} {name}")


NOT_EQUAL = 3
_SHOWN = 10

COMMANDS: dict[str, Command] = {
    "plan": Command(PlanOptions, _plan),
    "train": Command(TrainOptions, _train),
    "prepare": Command(PrepareOptions, _prepare),
    "evaluate": Command(EvaluateOptions, _evaluate, json=True),
    "generate": Command(GenerateOptions, _generate, json=True),
    "convert": Command(ConvertOptions, _convert),
    "verify": Command(VerifyOptions, _verify, json=True),
    "inspect": Command(InspectOptions, _inspect, json=True),
    "tokenizer train": Command(TokenizerOptions, _train_bpe),
    "tokenizer add-token": Command(AddTokenOptions, _add_tokens),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done; 2 something the user can mend, in the input or on the machine (a full disk, too little memory); 1 a fault
    of the program; 3 two checkpoints that are not equal; 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names that the terminal's encoding lacks are no reason to fail
            stream.reconfigure(errors="backslashreplace")
    traceback = "--traceback" in arguments
    options: Options | None = None
    try:
        command, options, as_json = parse(arguments)
        return (command.run(options, as_json) if command.json else command.run(options)) or 0
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has left, as `| head` does
            sys.stderr.close()
            return 1
        return _fail(_said(error, options), 2)
    except KeyboardInterrupt:
        training = isinstance(options, TrainOptions)
        hint = "; `gptj train --output RUN --resume` goes on from a run's newest checkpoint" if training else ""
        return _fail(f"interrupted{hint}", 130)
    except Exception as error:
        if traceback:
            raise
        if _is_out_of_memory(error):
            hint = "; lower --micro-batch-size, --sequence-length or --kept-layers"
            return _fail(f"out of memory: {error}{hint if isinstance(options, TrainOptions) else ''}", 2)
        return _fail(f"internal error: {type(error).__name__}: {error} (--traceback shows where)", 1)


def _said(error: Exception, options: Options | None) -> str:
    if not (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return str(error)
    where = error.filename or getattr(options, "output", None) or "output"  # a write does not know its file's name
    return f"{where}: {error.strerror}; make room and run the command again (a training run with --resume)"


def _is_out_of_memory(error: Exception) -> bool:
    # the CPU's allocator has no exception of its own
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fail(message: str, code: int) -> int:
    print(f"gptj: {_plain(message)[:_LONGEST_MESSAGE]}", file=sys.stderr)
    return code


def _plain(text: str) -> str:
    """On one line, without what a terminal would take as a command: names may come from a stranger's file."""
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in " ".join(text.split()))


_LONGEST_MESSAGE = 2000


def parse(arguments: list[str]) -> tuple[Command, Options, bool]:
    """The command that the arguments name, its options, and whether to print JSON.

    Raises:
        UserError: an unknown command or option, or an option out of its bounds.
    """
    name, rest = _command(arguments)
    command = COMMANDS[name]
    given, unknown = _parser(name, command).parse_known_args(rest)
    if unknown:
        if unknown[0].startswith("--"):
            raise unknown_option(unknown[0].removeprefix("--").partition("=")[0], command.options)
        raise UserError(f"unexpected argument {unknown[0]!r}; options are written --name value")
    values: dict[str, Any] = vars(given)
    values.pop("traceback", None)  # main has seen it
    as_json = values.pop("json", False)
    if "config" not in command.options.model_fields and (config := values.pop("config", None)):
        values = command.options.layered(read_yaml(Path(config)), values)
    if command.options is TrainOptions and values.get("resume") is True and "output" in values:
        values = RunFolder(Path(values["output"])).merged(values)
    return command, command.options.parse(values), as_json


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        raise SystemExit(0)
    if arguments[0] == "--version":
        print(f"gptj-stream {version('gptj-stream')}")
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    nearest = difflib.get_close_matches(" ".join(arguments[:2]), COMMANDS, n=1) or difflib.get_close_matches(
        arguments[0], COMMANDS, n=1
    )
    hint = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
    raise UserError(f"unknown command {arguments[0]!r}; {hint}")


def _print_help() -> None:
    print("gptj: fine-tune all of GPT-J on the machine you have\n")
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        print(f"  gptj {name:<{width}} {(command.options.__doc__ or '').strip().splitlines()[0]}")
    print("\n`gptj COMMAND --help` lists a command's options. `--config FILE.yaml` reads them from a file.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the options")


def _parser(name: str, command: Command) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"gptj {name}",
        description=command.options.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-5 is a number, not an option; so since Python 3.14
    if "config" not in command.options.model_fields:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line goes before it.")
    parser.add_argument("--traceback", action="store_true", help="Show where a fault of the program happened.")
    if command.json:
        parser.add_argument("--json", action="store_true", help="Print results as JSON.")
    for field_name, field in command.options.model_fields.items():
        argument = _argument(field)
        if field_name in command.options.positional:
            argument.pop("required", None)
            several = argument.pop("action", "") == "extend"
            argument |= {"nargs": "*" if several else "?", "metavar": field_name.upper()}
            parser.add_argument(field_name, **argument)
            continue
        parser.add_argument("--" + field_name.replace("_", "-"), **argument)
        if "_" in field_name:  # the name as Python and YAML spell it
            parser.add_argument("--" + field_name, **argument | {"help": argparse.SUPPRESS})
    return parser


def _argument(field: FieldInfo) -> dict[str, Any]:
    """argparse's view of a field. Values stay strings: the options' own types and bounds judge them."""
    text = (field.description or "").replace("%", "%%")
    if not field.is_required() and field.default not in (None, (), False):
        text += f" Default: {field.default}."
    kinds = _kinds(field.annotation)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    metavar = "{" + ",".join(choices) + "}" if choices else _metavar(kinds)
    if any(get_origin(kind) is tuple for kind in kinds):
        return {"nargs": "+", "action": "extend", "metavar": metavar, "help": text}
    return {"metavar": metavar, "help": text, "required": False}


def _kinds(annotation: Any) -> list[Any]:
    """The members of `A | B | None` without None, and without pydantic's annotations."""
    if hasattr(annotation, "__metadata__"):
        return _kinds(annotation.__origin__)
    arguments = get_args(annotation)
    if type(None) in arguments:
        return [kind for argument in arguments if argument is not type(None) for kind in _kinds(argument)]
    return [annotation]


def _metavar(kinds: list[Any]) -> str:
    leaves = {leaf for kind in kinds for leaf in (get_args(kind) or (kind,))}
    return "PATH" if Path in leaves else "N" if int in leaves else "X" if float in leaves else "TEXT"
