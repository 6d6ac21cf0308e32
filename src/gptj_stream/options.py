"""Every job's options, each declared once: type, default, bounds and a sentence.

The command line, `--config` files, the help texts and the `config.yaml` that a run keeps all come from here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gptj_stream.config import PRESETS, first_validation_error
from gptj_stream.errors import UserError

Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["cosine", "linear", "constant"]
PackingMode = Literal["concat", "documents", "none"]
LongDocuments = Literal["split", "drop"]
OptimizerState = Literal["auto", "fp32", "compact"]
SaveDtype = Literal["auto", "float32", "float16", "bfloat16"]


def _tuple_of_one(value: object) -> object:
    return (value,) if isinstance(value, str | Path) else value


_UNITS = {unit: 1024 ** (1 + place) for place, unit in enumerate("KMGT")}


def _bytes(value: object) -> object:
    """Bytes of `20GiB`, `20GB`, `20G` (the same: what memory is sold as), `512MiB`, or a plain number."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]{1,18}\.?[0-9]{0,18}) *(?:([KMGT])(?:i?B)?|B)?", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{value!r} is not a size: write it as 20GiB or 512MiB")
    return int(float(match[1]) * _UNITS.get((match[2] or "").upper(), 1))


def _store(value: str) -> str:
    if value not in STORES and not re.search(r"[/\\.]", value):
        nearest = difflib.get_close_matches(value, STORES, n=1) or STORES
        raise ValueError(f"store is {value!r}: give one of {', '.join(nearest)}, or a path such as ./{value}")
    return value


STORES = ("auto", "resident", "host", "file")
Size = Annotated[int, BeforeValidator(_bytes), Field(gt=0)]
StorePlace = Annotated[str, AfterValidator(_store)]

# in a file, one value needs no brackets
Sources = Annotated[tuple[Path, ...], BeforeValidator(_tuple_of_one), Field(min_length=1)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]

DEVICE = "Where to compute: a CUDA device if there is one, else the CPU."
PRECISION = "Arithmetic of the model; `auto` is bf16 where the device multiplies it natively, else fp32."
SEQUENCE_LENGTH = "Tokens a sequence; default: the model's n_positions, at most 2048."
SOURCE = (
    "Checkpoint: a folder in Hugging Face layout (safetensors or PyTorch files; GPT-J or CodeGen), one file of weights "
    "with its config.json beside it, or mesh-transformer-jax's shards, as a folder or a .tar.zstd."
)
SOURCE_CONFIG = "config.json, or mesh-transformer-jax's configuration; default: the one in the checkpoint."
MODEL_MEMORY = (
    "Limit of this process's memory, such as 8GiB; a model that does not fit is read layer by layer in every pass. "
    "Default: what is free."
)


class Options(BaseModel):
    """What all option sets share: frozen, and no name that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    exclusive: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of options that replace each other."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Options that the command line takes by their place."""

    @classmethod
    def layered(cls, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `below` with those of `above` over them; of a pair that excludes each other the upper stays."""
        merged = {**below, **above}
        for pair in cls.exclusive:
            for name, other in (pair, pair[::-1]):
                if above.get(name) and not above.get(other):
                    merged.pop(other, None)
        return merged

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Validate `values`.

        Raises:
            UserError: an unknown name (with the nearest valid one), a value out of its bounds, or a contradiction.
        """
        for name in values:
            if name not in cls.model_fields:
                raise unknown_option(name, cls)
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError(first_validation_error(error)) from None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


AnyOptions = TypeVar("AnyOptions", bound=Options)


def unknown_option(name: str, options: type[Options]) -> UserError:
    nearest = difflib.get_close_matches(name.replace("-", "_"), options.model_fields, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else f"; the options are {', '.join(options.model_fields)}"
    return UserError(f"unknown option {name}{hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The options of a YAML file, by name (dashes read as underscores).

    Raises:
        UserError: no such file, not YAML, or not a mapping of names to values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `option: value` lines, found a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _known_preset(value: str | None) -> str | None:
    if value is not None and value not in PRESETS and not value.endswith(".json"):
        nearest = difflib.get_close_matches(value, PRESETS, n=1) or list(PRESETS)
        raise ValueError(f"preset is {value!r}: give one of {', '.join(nearest)}, or a config.json")
    return value


class TrainOptions(Options):
    """Train a GPT-J: further from a checkpoint (--model), or from fresh weights (--preset)."""

    exclusive = (("model", "preset"), ("max_steps", "epochs"), ("resume", "overwrite"))

    model: Path | None = Field(None, description="Checkpoint to start from, in any format that inspect knows.")
    preset: Annotated[str | None, AfterValidator(_known_preset)] = Field(
        None, description=f"Start from fresh weights instead: {', '.join(PRESETS)}, or a config.json."
    )
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files; default: the one of --model.")
    data: Sources = Field(description="Files (.txt, .md, .jsonl), folders of them, or one folder made by prepare.")
    output: Path = Field(description="Run folder: ends in Hugging Face layout, with run/ for metrics and resume state.")

    sequence_length: int | None = Field(None, ge=2, description=SEQUENCE_LENGTH)
    packing: PackingMode | None = Field(
        None,
        description="`concat`: documents joined by eos and cut at the sequence length, attention runs across them; "
        "`documents`: whole documents packed into sequences, each attends to itself alone; `none`: one document a "
        "sequence. Default: `concat` for text, `documents` for prompt/completion.",
    )
    long_documents: LongDocuments | None = Field(
        None,
        description="A document longer than a sequence (not for `concat`) is cut into pieces or left out. "
        "Default: texts are split, prompt/completion records dropped.",
    )

    max_steps: int | None = Field(None, ge=1, le=10**9, description="Optimizer steps; default: by --epochs.")
    epochs: float | None = Field(
        None, gt=0, le=10**6, description="Passes over the data; default: 1, or by --max-steps."
    )
    micro_batch_size: int = Field(4, ge=1, description="At most so many sequences pass through a layer at once.")
    global_batch_size: int = Field(
        16, ge=1, le=10**6, description="Sequences an optimizer step; any number of micro-batches."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of fresh weights, the order of the data and dropout.")

    learning_rate: float = Field(1e-5, gt=0, lt=1, description="Peak of the schedule.")
    min_learning_rate: float = Field(0.0, ge=0, description="Where a cosine or linear schedule ends.")
    lr_scheduler_type: Schedule = Field("cosine", description="Shape of the schedule after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.1, ge=0, lt=1, description="Decoupled weight decay, on matrices and the embedding.")
    decay_vectors: bool = Field(False, description="Decay biases and norms too.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared gradient's running mean.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the root in AdamW's denominator.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this global norm; 0 does not clip.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Of embedding, residual and attention; default: the checkpoint's own rates."
    )

    precision: Precision = Field("auto", description=PRECISION)
    device: Device = Field("auto", description=DEVICE)
    optimizer_state: OptimizerState = Field(
        "auto",
        description="`fp32`: weights and moments in fp32, 16 bytes a parameter; `compact`: 24-bit weights and 8-bit "
        "moments, 7.1 bytes, on the CPU. Default: fp32 where it fits in memory.",
    )
    store: StorePlace = Field(
        "auto",
        description="Where weights, gradients and optimizer state live: `resident` (on the device), `host` (in RAM), "
        "`file` (in the run folder), or a folder on a fast disk; `auto`: the first of these that fits.",
    )
    memory: Size | None = Field(
        None, description="Hard limit of this process's memory, such as 20GiB; default: nearly all that is free."
    )
    device_memory: Size | None = Field(
        None, description="Hard limit of the CUDA device's memory; default: nearly all that is free."
    )
    kept_layers: int | None = Field(
        None,
        ge=0,
        description="Blocks that keep their activations for the backward pass; the others compute them again "
        "(activation checkpointing, also called gradient checkpointing). "
        "Default: as the plan finds fastest within the memory; then blocks may also keep a part of them.",
    )

    eval_data: Sources | None = Field(None, description="Held-out data, in any form that --data takes.")
    eval_steps: int | None = Field(None, ge=1, description="Evaluate every so many steps; default: ten times a run.")
    save_steps: int | None = Field(None, ge=1, description="Write a resumable checkpoint every so many steps.")
    save_total_limit: int = Field(2, ge=1, description="How many resumable checkpoints to keep.")
    logging_steps: int = Field(10, ge=1, description="Where there is no terminal, a line every so many steps.")
    export: Literal["best", "last"] = Field(
        "best", description="Weights that the run folder ends with: of the lowest evaluation loss, or of the last step."
    )
    save_dtype: SaveDtype = Field(
        "auto", description="Of the exported weights; `auto`: as in --model, float32 for fresh weights."
    )
    trace: Path | None = Field(
        None, description="Write a Chrome/Perfetto trace of the first steps: what was read, computed and written when."
    )
    resume: bool = Field(False, description="Continue the run in --output from its newest checkpoint.")
    overwrite: bool = Field(False, description="Delete a run that is already in --output.")

    @property
    def needs_tokenizer(self) -> bool:
        return True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, other in self.exclusive:
            if getattr(self, name) and getattr(self, other):
                raise ValueError(f"{name} and {other} contradict each other: give one of them")
        if self.model is None and self.preset is None:
            raise ValueError("give either --model (continue from a checkpoint) or --preset (fresh weights)")
        if self.preset is not None and self.tokenizer is None and self.needs_tokenizer:
            raise ValueError("--preset starts without a tokenizer: add --tokenizer FOLDER")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above the peak, learning_rate {self.learning_rate:g}"
            )
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than max_steps {self.max_steps}")
        if self.eval_steps is not None and self.eval_data is None:
            raise ValueError(f"eval_steps {self.eval_steps} needs --eval-data")
        return self


class PlanOptions(TrainOptions):
    """Say what a training run will need, whether it fits and how long it takes. Takes the options of train."""

    data: Sources | None = Field(None, description="Not read; training's own.")  # type: ignore[assignment]
    output: Path = Field(Path(), description="Run folder; its disk is what is measured. Default: this folder.")
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files: its size is a preset's.")
    refresh: bool = Field(False, description="Measure this machine again.")

    @property
    def needs_tokenizer(self) -> bool:
        return False


class PrepareOptions(Options):
    """Turn text into token files once, for any number of runs."""

    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files.")
    model: Path | None = Field(None, description="Checkpoint folder whose tokenizer to use instead.")
    data: Sources = Field(description="Files (.txt, .md, .jsonl) or folders of them.")
    output: Path = Field(description="Folder for the token files.")
    overwrite: bool = Field(False, description="Replace token files made from other data.")

    exclusive = (("tokenizer", "model"),)

    @model_validator(mode="after")
    def _has_tokenizer(self) -> Self:
        if (self.tokenizer is None) == (self.model is None):
            raise ValueError("give either --tokenizer FOLDER or --model CHECKPOINT")
        return self


class TokenizerOptions(Options):
    """Train a byte-level BPE tokenizer, in GPT-2's form, on your own text."""

    data: Sources = Field(description="Files (.txt, .md, .jsonl) or folders of them.")
    output: Path = Field(description="Folder for the tokenizer's files.")
    vocab_size: int = Field(8192, ge=257, le=50257, description="Number of tokens, <|endoftext|> among them.")


class AddTokenOptions(Options):
    """Give spare tokens (<|extratoken_1|>, ...) names of your own; every id stays what it is."""

    positional = ("folder", "tokens")

    folder: Path = Field(description="Folder with the tokenizer's files; they are changed in place.")
    tokens: Annotated[Texts, Field(min_length=1)] = Field(description="The new names, such as '<|sep|>'.")


class ConvertOptions(Options):
    """Write a checkpoint of any format as a folder that transformers and CTranslate2 load."""

    positional = ("source", "output")

    source: Path = Field(description=SOURCE)
    output: Path = Field(description="Folder to write.")
    dtype: SaveDtype = Field("auto", description="Of the weights written; `auto`: as they are stored.")
    max_shard_size: Size = Field(5_000_000_000, description="Bytes of a weight file, such as 2GiB.")
    config: Path | None = Field(None, description=SOURCE_CONFIG)
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files; default: the source's.")
    overwrite: bool = Field(False, description="Replace what is in the output folder.")


class InspectOptions(Options):
    """Say what a checkpoint is (format, shape, dtypes, tokenizer) and whether it is whole, without reading weights."""

    positional = ("source",)

    source: Path = Field(description=SOURCE)
    config: Path | None = Field(None, description=SOURCE_CONFIG)


class VerifyOptions(Options):
    """Compare two checkpoints of any formats, tensor by tensor. Ends with code 0 if they are equal, else 3."""

    positional = ("first", "second")

    first: Path = Field(description=SOURCE)
    second: Path = Field(description="The other one.")
    logits: bool = Field(False, description="Also send the same text through both, in fp32.")
    text: str | None = Field(None, description="That text; by default a line of English, code and other scripts.")
    config: Path | None = Field(None, description=SOURCE_CONFIG)
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files; default: each one's own.")


class EvaluateOptions(Options):
    """Loss, perplexity and bits per byte of a model on held-out data, each document on its own."""

    model: Path = Field(description="Checkpoint in any format that inspect knows, or a run folder.")
    data: Sources = Field(description="Held-out data, in any form that train takes.")
    sequence_length: int | None = Field(None, ge=2, description=SEQUENCE_LENGTH + " Longer documents are cut.")
    micro_batch_size: int = Field(8, ge=1, description="Sequences that pass through a layer at once.")
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files; default: the model's.")
    precision: Precision = Field("auto", description=PRECISION)
    device: Device = Field("auto", description=DEVICE)
    memory: Size | None = Field(None, description=MODEL_MEMORY)
    device_memory: Size | None = Field(None, description="The same of the CUDA device's memory.")


class GenerateOptions(Options):
    """Continue prompts."""

    model: Path = Field(description="Checkpoint in any format that inspect knows, or a run folder.")
    prompt: Texts = Field((), description="One or more prompts. Control tokens spelled out in them are ordinary text.")
    prompt_file: Path | None = Field(None, description="JSONL file with a `prompt` (or `text`) a line.")
    max_new_tokens: int = Field(64, ge=1, description="At most so many tokens a prompt.")
    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token each time (greedy).")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0 is no limit.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample among the likeliest tokens that make up this share.")
    stop: Texts = Field((), description="End a continuation before any of these strings.")
    micro_batch_size: int = Field(
        8, ge=1, description="Prompts continued together; lower it where the cache does not fit in memory."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of sampling; each prompt draws its own numbers.")
    tokenizer: Path | None = Field(None, description="Folder with the tokenizer's files; default: the model's.")
    precision: Precision = Field("auto", description=PRECISION)
    device: Device = Field("auto", description=DEVICE)
    memory: Size | None = Field(None, description=MODEL_MEMORY)
    device_memory: Size | None = Field(None, description="The same of the CUDA device's memory.")

    @model_validator(mode="after")
    def _has_prompt(self) -> Self:
        if not self.prompt and self.prompt_file is None:
            raise ValueError("nothing to continue: give --prompt TEXT or --prompt-file FILE")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty: leave it out")
        return self
