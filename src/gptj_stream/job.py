"""What a training run works with: opened, checked and planned before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gptj_stream.checkpoint.huggingface import HuggingFaceFolder
from gptj_stream.checkpoint.native import checkpoint_step, checkpoints, load_checkpoint
from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.data.batches import Batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.evaluate import HeldOut, checked_sequence_length
from gptj_stream.executor import block_activation_bytes, model_layouts
from gptj_stream.files import read_json
from gptj_stream.machine import free_memory, resolve_device, resolve_dtype
from gptj_stream.optim import AdamW
from gptj_stream.options import PackingMode, TrainOptions
from gptj_stream.prepare import check_sources, open_data
from gptj_stream.pretrained import check_memory, fill_fresh
from gptj_stream.report import Report, gib
from gptj_stream.run_folder import RunFolder
from gptj_stream.store import ResidentStore, Store

STATE_BYTES = 16
"""Bytes a parameter that the resident store keeps for training: weight, gradient and two moments in fp32."""


@dataclass
class Progress:
    """Where a run stands: what its checkpoints remember beside weights, moments and the place in the data."""

    step: int = 0
    loss: float = math.nan
    best_loss: float | None = None
    best_step: int = 0


@dataclass(frozen=True)
class Job:
    """Everything a run works with, opened and checked."""

    options: TrainOptions  # with the defaults that depend on data and model resolved
    steps: int
    eval_steps: int
    save_steps: int
    kept_layers: int
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    source: HuggingFaceFolder | None
    tokenizer_folder: Path
    batches: Batches
    held_out: HeldOut | None
    folder: RunFolder
    report: Report


def open_job(options: TrainOptions, report: Report) -> Job:
    folder = RunFolder(options.output)
    if options.resume:
        return _open_run(folder, folder.resumed_options(options), report)
    check_sources(options.data)
    check_sources(options.eval_data or ())
    for path in (*options.data, *(options.eval_data or ())):
        if path.is_dir() and options.output.resolve().is_relative_to(path.resolve()):
            raise UserError(f"output {options.output} lies inside the data folder {path}; use one outside it")
    folders = [path for path in (options.model, options.tokenizer) if path]
    with folder.start(overwrite=options.overwrite, inputs=[*folders, *options.data, *(options.eval_data or ())]):
        return _open_run(folder, options, report)


def _open_run(folder: RunFolder, options: TrainOptions, report: Report) -> Job:
    source = HuggingFaceFolder(options.model) if options.model else None
    tokenizer_folder = options.tokenizer or options.model
    assert tokenizer_folder is not None, "TrainOptions asks for one of the two"
    tokenizer = Tokenizer.load(tokenizer_folder)
    config = _model_config(options, source, tokenizer)
    sequence_length = checked_sequence_length(options.sequence_length, config)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.precision, device)
    kept_layers = _kept_layers(options, config, sequence_length, device, dtype)

    tokens = folder.tokens
    dataset = open_data(options.data, tokenizer, tokens / "train", report, reuse=options.resume)
    dataset.check_ids(config.vocab_size)
    held_out = None
    if options.eval_data:
        held_out_tokens = open_data(options.eval_data, tokenizer, tokens / "held-out", report, reuse=options.resume)
        held_out = HeldOut(held_out_tokens, config, sequence_length)
    mode: PackingMode = options.packing or ("concat" if dataset.mask is None else "documents")
    packing = pack(dataset, sequence_length, mode, options.long_documents)
    if packing.dropped_long:
        report.note(f"{packing.dropped_long:,} documents longer than {sequence_length} tokens left out")

    if options.max_steps:
        rows, steps = None, options.max_steps
    else:
        rows = round((options.epochs or 1.0) * packing.rows) or 1
        steps = -(-rows // options.global_batch_size)
    if options.warmup_steps >= steps:
        raise UserError(f"warmup_steps {options.warmup_steps} must be less than the run's {steps} steps; lower it")
    saved = checkpoints(folder.checkpoints)
    if saved and (done := checkpoint_step(saved[-1])) > steps:
        raise UserError(f"{folder.root} is at step {done} already, beyond the {steps} asked for; raise --max-steps")
    report.note(
        f"{config.parameters:,} parameters; {packing.rows:,} sequences of up to {sequence_length} tokens, "
        f"{packing.efficiency:.0%} full; {steps:,} steps of {options.global_batch_size}; "
        f"{kept_layers} of {config.n_layer} blocks keep their activations"
    )
    options = options.model_copy(
        update={
            "packing": mode,
            "sequence_length": sequence_length,
            "epochs": None if options.max_steps else options.epochs or 1.0,
            "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
            "resume": False,
            "overwrite": False,
        }
    )
    folder.keep_options(options)
    tenth = -(-steps // 10)
    return Job(
        options=options,
        steps=steps,
        eval_steps=options.eval_steps or tenth,
        save_steps=options.save_steps or tenth,
        kept_layers=kept_layers,
        config=config,
        device=device,
        dtype=dtype,
        source=source,
        tokenizer_folder=tokenizer_folder,
        batches=Batches(dataset, packing, options.micro_batch_size, options.global_batch_size, options.seed, rows=rows),
        held_out=held_out,
        folder=folder,
        report=report,
    )


def _kept_layers(
    options: TrainOptions, config: ModelConfig, sequence_length: int, device: torch.device, dtype: torch.dtype
) -> int:
    """How many blocks keep their activations: as asked, or as many as fit in half of what the rest leaves free.

    Raises:
        UserError: weights, gradients, moments and every layer's input do not fit.
    """
    tokens = options.global_batch_size * sequence_length
    inputs = config.n_layer * tokens * config.n_embd * dtype.itemsize
    needed = STATE_BYTES * config.parameters + inputs
    state = f"training {config.parameters:,} parameters keeps {STATE_BYTES} bytes for each"
    check_memory(f"{state}, and {gib(inputs)} of layer inputs", needed, device)
    if options.kept_layers is not None:
        return min(options.kept_layers, config.n_layer)
    fitting = 0.5 * (free_memory(device) - needed) / block_activation_bytes(config, tokens, dtype)
    return min(int(fitting), config.n_layer)


def _model_config(options: TrainOptions, source: HuggingFaceFolder | None, tokenizer: Tokenizer) -> ModelConfig:
    """The checkpoint's shape, a preset's or a `config.json`'s; a tokenizer that is named decides the end of text.

    A preset keeps GPT-J's 50400 rows for a tokenizer of GPT-2's size. Another gets rows rounded up to a multiple of 64.

    Raises:
        UserError: a `config.json` that is not one, or a tokenizer with more tokens than the model has rows.
    """
    preset = str(options.preset)
    if source:
        config = source.config
    elif preset.endswith(".json"):
        config = ModelConfig.from_huggingface(read_json(Path(preset)), preset)
    else:
        config = PRESETS[preset]
        if not 50257 <= tokenizer.vocab_size <= config.vocab_size:
            config = config.model_copy(update={"vocab_size": -(-tokenizer.vocab_size // 64) * 64})
    if not options.tokenizer:
        return config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{options.tokenizer}: {tokenizer.vocab_size} tokens are more than the model's {config.vocab_size} rows; "
            "use the model's own tokenizer"
        )
    return config.model_copy(update={"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id})


def open_store(job: Job) -> tuple[Store, Progress]:
    """The model's weights and moments: resumed, from the checkpoint, or fresh."""
    options = job.options
    optimizer = AdamW(
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
        decay_vectors=options.decay_vectors,
    )
    store = ResidentStore(model_layouts(job.config), device=job.device, dtype=job.dtype, optimizer=optimizer)
    if saved := checkpoints(job.folder.checkpoints):  # a new run's folder has none
        state = load_checkpoint(saved[-1], store)
        try:
            job.batches.load_state_dict(state["data"])
            progress = Progress(**state["progress"])
        except (KeyError, TypeError):
            raise UserError(
                f"{saved[-1]}: state.json is damaged; remove {saved[-1].name} to use the one before"
            ) from None
        job.report.note(f"resumed at step {progress.step:,}")
        return store, progress
    if job.source:
        job.source.load(store, job.report)
    else:
        fill_fresh(store, job.config, options.seed)
    return store, Progress()
