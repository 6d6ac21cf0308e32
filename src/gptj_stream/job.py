"""What a training run works with: opened, checked and planned before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptj_stream.checkpoint.native import checkpoints, load_checkpoint
from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.choice import fastest_plan, fitting_plan
from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.data.batches import Batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.evaluate import HeldOut, checked_sequence_length
from gptj_stream.files import read_json
from gptj_stream.machine import resolve_device, resolve_dtype, return_freed_memory
from gptj_stream.options import PackingMode, PlanOptions, TrainOptions
from gptj_stream.plan import Plan, described, state_name
from gptj_stream.prepare import check_sources, open_data
from gptj_stream.pretrained import fill_fresh
from gptj_stream.report import Report
from gptj_stream.run_folder import RunFolder
from gptj_stream.speed import Speed
from gptj_stream.store import FileHome, Home, MemoryHome, Store
from gptj_stream.store.file_home import Owner, check_place
from gptj_stream.trace import Trace


@dataclass
class Progress:
    """Where a run stands: what its checkpoints remember beside weights, moments and the place in the data."""

    step: int = 0
    loss: float = math.nan
    evaluated_step: int = 0
    best_loss: float | None = None
    best_step: int = 0


@dataclass(frozen=True)
class Job:
    """Everything a run works with, opened and checked."""

    options: TrainOptions  # with the defaults that depend on data and model resolved
    steps: int
    eval_steps: int
    save_steps: int
    plan: Plan
    speed: Speed
    config: ModelConfig
    resumes: bool
    source: Checkpoint | None
    tokenizer_folder: Path
    batches: Batches
    held_out: HeldOut | None
    folder: RunFolder
    report: Report
    trace: Trace


def open_job(options: TrainOptions, report: Report) -> Job:
    return_freed_memory()
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


def plan_run(options: PlanOptions, report: Report) -> tuple[Plan, Speed]:
    """What training with these options takes, without starting it.

    Raises:
        UserError: no such model, or a machine too small for it; the message says what would do.
    """
    source = Checkpoint(options.model) if options.model else None
    config = _model_config(options, source, Tokenizer.load(options.tokenizer) if options.tokenizer else None)
    return fastest_plan(_fitting_plan(options, config, source), options, report, refresh=options.refresh)


def _fitting_plan(options: TrainOptions, config: ModelConfig, source: Checkpoint | None) -> Plan:
    device = resolve_device(options.device)
    config = config if options.dropout is None else config.with_dropout(options.dropout)
    length = checked_sequence_length(options.sequence_length, config)
    dtype = resolve_dtype(options.precision, device)
    return fitting_plan(options, config, device, dtype, length, saved_dtype(options, source))


def saved_dtype(options: TrainOptions, source: Checkpoint | None) -> torch.dtype:
    """Of the weights that the run leaves."""
    if options.save_dtype == "auto":
        return source.dtype if source else torch.float32
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[options.save_dtype]


def _open_run(folder: RunFolder, options: TrainOptions, report: Report) -> Job:
    source = Checkpoint(options.model) if options.model else None
    tokenizer_folder = options.tokenizer or (source.folder if source else None)
    assert tokenizer_folder is not None, "TrainOptions asks for one of the two"
    tokenizer = Tokenizer.load(tokenizer_folder)
    config = _model_config(options, source, tokenizer)
    plan = _fitting_plan(options, config, source)
    if plan.kind == "file":
        check_place(plan.folder, _owner(folder, plan))
    sequence_length = plan.sequence_length
    resumes = options.resume
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
    plan, speed = fastest_plan(plan, options, report)
    report.note(described(plan, speed))
    report.note(
        f"{packing.rows:,} sequences of up to {sequence_length} tokens, "
        f"{packing.efficiency:.0%} full; {steps:,} steps of {options.global_batch_size}"
    )
    options = options.model_copy(
        update={
            "packing": mode,
            "sequence_length": sequence_length,
            "epochs": None if options.max_steps else options.epochs or 1.0,
            "precision": "bf16" if plan.dtype == torch.bfloat16 else "fp32",
            "store": plan.kind if options.store == "auto" else options.store,
            "optimizer_state": state_name(plan.optimizer),
            "resume": False,
            "overwrite": False,
        }
    )
    if options.trace:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
    folder.keep_options(options)
    tenth = -(-steps // 10)
    return Job(
        options=options,
        steps=steps,
        eval_steps=options.eval_steps or tenth,
        save_steps=options.save_steps or tenth,
        plan=plan,
        speed=speed,
        config=config,
        resumes=resumes,
        source=source,
        tokenizer_folder=tokenizer_folder,
        batches=Batches(dataset, packing, options.micro_batch_size, options.global_batch_size, options.seed, rows=rows),
        held_out=held_out,
        folder=folder,
        report=report,
        trace=Trace(events=options.trace is not None),
    )


def _model_config(options: TrainOptions, source: Checkpoint | None, tokenizer: Tokenizer | None) -> ModelConfig:
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
        if tokenizer and not 50257 <= tokenizer.vocab_size <= config.vocab_size:
            config = config.model_copy(update={"vocab_size": -(-tokenizer.vocab_size // 64) * 64})
    if not (options.tokenizer and tokenizer):
        return config
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{options.tokenizer}: {tokenizer.vocab_size} tokens are more than the model's {config.vocab_size} rows; "
            "use the model's own tokenizer"
        )
    return config.model_copy(update={"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id})


def open_store(job: Job) -> tuple[Store, Progress]:
    """The model's weights and moments: resumed, from the checkpoint, or fresh."""
    store = _new_store(job)
    if isinstance(store.home, FileHome):
        if store.home.complete:
            return store, _resumed(job, store.home.note, f"{job.plan.folder}: store.json is damaged")
    elif saved := checkpoints(job.folder.checkpoints):  # a new run's folder has none
        state = load_checkpoint(saved[-1], store)
        return store, _resumed(
            job, state, f"{saved[-1]}: state.json is damaged; remove {saved[-1].name} to use the one before"
        )
    if job.source:
        job.source.load(store, job.report)
    else:
        fill_fresh(store, job.config, job.options.seed)
    progress = Progress()
    if isinstance(store.home, FileHome):
        store.home.annotate(run_state(job, progress))
    return store, progress


def run_state(job: Job, progress: Progress) -> dict[str, Any]:
    """What a resumed run needs beside weights and moments, as JSON values."""
    return {"data": job.batches.state_dict(), "progress": asdict(progress)}


def _new_store(job: Job) -> Store:
    plan, trace = job.plan, job.trace
    gradient_dtype = plan.optimizer.gradient_dtype
    home: Home
    if plan.kind == "file":
        if job.resumes and job.folder.has_steps() and not (plan.folder / "store.json").exists():
            raise UserError(
                f"{plan.folder}: the run's store is not there; mount its disk, or begin again with --overwrite"
            )
        home = FileHome(
            plan.folder,
            plan.parts,
            gradient_dtype=gradient_dtype,
            owner=_owner(job.folder, plan),
            in_memory=plan.layers_in_memory,
            pinned=plan.crosses,
            trace=trace,
        )
        if not home.direct:
            job.report.note(f"{plan.folder}: this file system has no direct I/O; reads and writes go through its cache")
    else:
        device = plan.device if plan.kind == "resident" else torch.device("cpu")
        home = MemoryHome(plan.parts, device=device, gradient_dtype=gradient_dtype, pinned=plan.crosses)
    return Store(plan.layouts, home, device=plan.device, dtype=plan.dtype, optimizer=plan.optimizer, trace=trace)


def _owner(folder: RunFolder, plan: Plan) -> Owner:
    config, identity = plan.config, folder.identity()
    return Owner(
        run=identity["run"] or "",
        replaces=identity["replaces"],
        model=f"GPT-J of {config.n_layer} blocks, n_embd {config.n_embd}, n_inner {config.inner_dim}, "
        f"vocab_size {config.vocab_size}",
        optimizer_state=state_name(plan.optimizer),
        folder=str(folder.root.resolve()),
    )


def _resumed(job: Job, state: Mapping[str, Any], damaged: str) -> Progress:
    try:
        job.batches.load_state_dict(state["data"])
        progress = Progress(**state["progress"])
    except (KeyError, TypeError):
        raise UserError(damaged) from None
    if progress.step > job.steps:
        raise UserError(
            f"{job.folder.root} is at step {progress.step} already, beyond the {job.steps} asked for; raise --max-steps"
        )
    job.report.note(f"resumed at step {progress.step:,}")
    return progress
