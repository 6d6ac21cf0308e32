"""Checkpoints from one format to another, looked into, and compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptj_stream.checkpoint.folder import checkpoint_weights, write_folder
from gptj_stream.checkpoint.source import FLOATING, Checkpoint, is_buffer, provenance
from gptj_stream.checkpoint.tensors import StoredTensor
from gptj_stream.config import ModelConfig
from gptj_stream.data import tokenizer as tokenizer_files
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.options import ConvertOptions, InspectOptions, VerifyOptions
from gptj_stream.pretrained import load
from gptj_stream.report import Report, gib

_LOGITS_TEXT = "The law of the conservation of energy says that 3 + 4 = 7; def f(x): return x ** 2. Żółta łódź, 北京."


@dataclass(frozen=True)
class Converted:
    output: Path
    config: ModelConfig
    dtype: torch.dtype
    nbytes: int


def convert(options: ConvertOptions, report: Report) -> Converted:
    """Write a checkpoint of any format as a folder in Hugging Face layout, which appears whole or not at all.

    Raises:
        UserError: the checkpoint is not whole or not sound, `output` is there already, or its disk is too small.
    """
    _check_output(options)
    tokenizer_folder = options.tokenizer or (options.source if options.source.is_dir() else options.source.parent)
    carried = tokenizer_files.files(tokenizer_folder)
    if options.tokenizer and not carried:
        raise UserError(f"{options.tokenizer} holds no tokenizer; name a folder with tokenizer.json")
    source = Checkpoint(options.source, options.config)
    source.check(model_layouts(source.config))
    dtype = source.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    nbytes = source.config.parameters * dtype.itemsize
    place = next(parent for parent in options.output.resolve().parents if parent.is_dir())
    if nbytes > (free := shutil.disk_usage(place).free):
        raise UserError(f"{options.output}: {gib(nbytes)} are needed, {gib(free)} are free in {place}")
    write_folder(
        options.output,
        source.config,
        checkpoint_weights(source),
        dtype=dtype,
        carried_files=carried,
        source=source.folder,
        max_shard_size=options.max_shard_size,
        provenance=provenance(source),
        report=report,
    )
    if not carried:
        report.note(
            f"{tokenizer_folder} has no tokenizer; copy tokenizer.json (or vocab.json and merges.txt) into "
            f"{options.output}, or convert with --tokenizer FOLDER"
        )
    return Converted(options.output, source.config, dtype, nbytes)


def _check_output(options: ConvertOptions) -> None:
    """Refuse an output that would cost the user files: what is read, or what is no checkpoint.

    Raises:
        UserError: it would.
    """
    output, place = options.output, options.output.resolve()
    if not output.name or place == Path.cwd():
        raise UserError(f"output is {str(output)!r}; name a folder of its own")
    for path in (options.source, options.tokenizer, options.config):
        if path and path.resolve().is_relative_to(place):
            raise UserError(f"{output} holds {path}, which is read; name another folder")
    if not output.exists():
        return
    if not options.overwrite:
        raise UserError(f"{output} exists already; name another folder, or add --overwrite")
    inside = list(output.iterdir()) if output.is_dir() else [output]
    if inside and not ((output / "config.json").is_file() and all(path.is_file() for path in inside)):
        raise UserError(f"{output} is no checkpoint folder, or holds other folders; --overwrite would delete all of it")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, by its headers.

    Attributes:
        dtypes: how many of the model's tensors are stored in each.
        nbytes: of the weights' files.
        problems: why it cannot be trained or converted; empty if it can.
        tokenizer: in words; empty if there is none.
        spare_tokens: names that the tokenizer has for rows that no text leads to.
    """

    path: Path
    format: str
    config: ModelConfig
    step: int | None
    dtypes: dict[str, int]
    nbytes: int
    files: int
    buffers: int
    tokenizer: str
    spare_tokens: int
    unnamed_rows: int
    problems: list[str] = field(default_factory=list)


def inspect(options: InspectOptions) -> Inspection:
    """Read a checkpoint's headers.

    Raises:
        UserError: nothing of a known format.
    """
    source = Checkpoint(options.source, options.config)
    problems = list(filter(None, [_problem(source)]))
    dtypes: dict[str, int] = {}
    for name, tensor in source.tensors.items():
        if not is_buffer(name):
            kind = str(tensor.dtype).removeprefix("torch.")
            dtypes[kind] = dtypes.get(kind, 0) + 1
    words, spare, unnamed = "", 0, 0
    try:
        tokenizer = Tokenizer.load(source.folder)
        spare = len(tokenizer.spare_tokens())
        unnamed = source.config.vocab_size - tokenizer.vocab_size
        if unnamed < 0:
            problems.append(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, beyond the model's rows")
        words = f"{tokenizer.vocab_size:,} tokens, end of text {tokenizer.eos_token_id}"
    except UserError as error:
        if tokenizer_files.files(source.folder):
            problems.append(str(error))
    return Inspection(
        path=source.path,
        format=source.format,
        config=source.config,
        step=source.step,
        dtypes=dtypes,
        nbytes=sum(path.stat().st_size for path in source.files),
        files=len(source.files),
        buffers=sum(map(is_buffer, source.tensors)),
        tokenizer=words,
        spare_tokens=spare,
        unnamed_rows=unnamed,
        problems=problems,
    )


@dataclass(frozen=True)
class Comparison:
    """What is different between two checkpoints.

    Attributes:
        config: fields that differ, with both values.
        only_first: names of tensors that the second lacks.
        only_second: the same the other way around.
        misshapen: tensors whose shapes differ, with both.
        differences: each common tensor's largest difference, 0.0 where all values are equal.
        not_finite: tensors with values that are not finite, and how many, in the first and in the second.
        problems: why one of them is not whole or not sound.
        logits: largest difference of the same text's logits; None where it was not asked for.
    """

    config: dict[str, tuple[object, object]]
    only_first: list[str]
    only_second: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    differences: dict[str, float]
    not_finite: dict[str, tuple[int, int]]
    problems: list[str]
    logits: float | None = None

    @property
    def equal(self) -> bool:
        """Whether both are the same model: same names, shapes and values, all of them finite."""
        named = self.config or self.only_first or self.only_second or self.misshapen or self.not_finite
        return not named and not self.problems and not any(self.differences.values())


def verify(options: VerifyOptions, report: Report) -> Comparison:
    """Compare two checkpoints, in any formats and dtypes, tensor by tensor.

    Raises:
        UserError: one of them is none, or is damaged.
    """
    first, second = (Checkpoint(path, options.config) for path in (options.first, options.second))
    if options.logits:  # before the hours that a comparison may take
        for each in (first, second):
            Tokenizer.load(options.tokenizer or each.folder)
    problems = [problem for each in (first, second) if (problem := _problem(each))]
    ours, theirs = first.config.model_dump(), second.config.model_dump()
    # what changes the numbers that the model gives; an inner width is the same written out or left to the default
    ours["n_inner"], theirs["n_inner"] = first.config.inner_dim, second.config.inner_dim
    decisive = set(ours) - {"initializer_range", "n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop"}
    config = {name: (ours[name], theirs[name]) for name in sorted(decisive) if ours[name] != theirs[name]}
    a, b = ({name: tensor for name, tensor in each.tensors.items() if not is_buffer(name)} for each in (first, second))
    common = [name for name in a if name in b]
    misshapen = {name: (a[name].shape, b[name].shape) for name in common if a[name].shape != b[name].shape}
    differences: dict[str, float] = {}
    not_finite: dict[str, tuple[int, int]] = {}
    with report.bar("compare", len(common)) as advance:
        for done, name in enumerate(common):
            advance(done, name)
            if name in misshapen:
                continue
            differences[name], counts = _difference(name, a[name], b[name])
            if any(counts):
                not_finite[name] = counts
        advance(len(common), "")
    only_first, only_second = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    logits = None
    if options.logits and not (config or only_first or only_second or misshapen or problems):
        logits = _logits_difference(options)
    return Comparison(config, only_first, only_second, misshapen, differences, not_finite, problems, logits)


def _problem(source: Checkpoint) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        source.check(model_layouts(source.config))
    except UserError as error:
        return str(error)
    return ""


def _difference(name: str, a: StoredTensor, b: StoredTensor) -> tuple[float, tuple[int, int]]:
    """The largest difference of values that are finite in both, and how many are not in each."""
    largest, first, second = 0.0, 0, 0
    for x, y in _side_by_side(name, a, b):
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        difference = x.to(wide) - y.to(wide)
        bad_x, bad_y = int((~torch.isfinite(x)).sum()), int((~torch.isfinite(y)).sum())
        if bad_x or bad_y:
            difference = difference.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        first, second = first + bad_x, second + bad_y
        largest = max(largest, float(difference.abs_().max()) if difference.numel() else 0.0)
    return largest, (first, second)


def _side_by_side(name: str, a: StoredTensor, b: StoredTensor) -> Iterator[tuple[Tensor, Tensor]]:
    for tensor in (a, b):
        if tensor.dtype not in FLOATING:
            raise UserError(f"{tensor.file}: {name} has dtype {tensor.dtype}; only floating point is compared")
    for start, stop in (a if a.rows_at_once > b.rows_at_once else b).steps():
        yield a.read_rows(start, stop), b.read_rows(start, stop)


def _logits_difference(options: VerifyOptions) -> float:
    """Of the same tokens through both models, in fp32."""
    logits: list[Tensor] = []
    ids: list[int] = []
    for path in (options.first, options.second):
        model = load(path, precision="fp32", config_file=options.config, tokenizer=options.tokenizer)
        ids = ids or model.tokenizer.encode(options.text or _LOGITS_TEXT)[: model.config.n_positions]
        logits.append(model.logits(ids))
    return float((logits[0] - logits[1]).abs().max())
