"""The training job: one loop for every store, precision and set of data."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from gptj_stream.checkpoint.huggingface import HuggingFaceFolder, write_folder
from gptj_stream.checkpoint.native import checkpoint_step, checkpoints, load_checkpoint, save_checkpoint
from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.data import tokenizer as tokenizer_files
from gptj_stream.data.batches import Batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.evaluate import Evaluation, HeldOut, checked_sequence_length, evaluate_on
from gptj_stream.executor import Executor, block_activation_bytes, model_layouts
from gptj_stream.files import read_json
from gptj_stream.machine import free_memory, gemm_flops, peak_memory, resolve_device, resolve_dtype
from gptj_stream.metrics import MetricsLog
from gptj_stream.optim import AdamW, Update, clip_coefficient, scheduled_learning_rate
from gptj_stream.options import PackingMode, TrainOptions
from gptj_stream.prepare import check_sources, open_data
from gptj_stream.pretrained import check_memory, fill_fresh
from gptj_stream.report import Advance, Report, gib
from gptj_stream.run_folder import RunFolder
from gptj_stream.store import ResidentStore, Store

STATE_BYTES = 16
"""Bytes a parameter that the resident store keeps for training: weight, gradient and two moments in fp32."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: the run folder, now a checkpoint in Hugging Face layout.
        step: the last step.
        loss: its loss.
        evaluation: of the last weights, if this call took a step and there was held-out data.
        exported_step: the step whose weights the folder holds.
    """

    output: Path
    step: int
    loss: float
    evaluation: Evaluation | None
    exported_step: int


@dataclass
class _Progress:
    """Where a run stands: what its checkpoints remember beside weights, moments and the place in the data."""

    step: int = 0
    loss: float = math.nan
    best_loss: float | None = None
    best_step: int = 0


def train(options: TrainOptions, report: Report | None = None) -> TrainResult:
    """Train, and leave the run folder as a checkpoint that transformers loads.

    Raises:
        UserError: bad input, or a loss that is not finite; the message says what, and how to go on.
    """
    job = _open_job(options, report or Report())
    store, progress = _open_store(job)
    return _Loop(job, store, progress).run()


@dataclass(frozen=True)
class _Job:
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


def _open_job(options: TrainOptions, report: Report) -> _Job:
    folder = RunFolder(options.output)
    if options.resume:
        return _open_run(folder, folder.resumed_options(options), report)
    check_sources(options.data)
    check_sources(options.eval_data or ())
    folders = [path for path in (options.model, options.tokenizer) if path]
    with folder.start(overwrite=options.overwrite, inputs=[*folders, *options.data, *(options.eval_data or ())]):
        return _open_run(folder, options, report)


def _open_run(folder: RunFolder, options: TrainOptions, report: Report) -> _Job:
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
    return _Job(
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


def _open_store(job: _Job) -> tuple[Store, _Progress]:
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
        job.batches.load_state_dict(state["data"])
        progress = _Progress(**state["progress"])
        job.report.note(f"resumed at step {progress.step:,}")
        return store, progress
    if job.source:
        job.source.load(store, job.report)
    else:
        fill_fresh(store, job.config, options.seed)
    return store, _Progress()


class _Loop:
    def __init__(self, job: _Job, store: Store, progress: _Progress) -> None:
        self.job, self.store, self.progress = job, store, progress
        self.options = job.options
        dropout = self.options.dropout
        config = job.config if dropout is None else job.config.with_dropout(dropout)
        self.executor = Executor(config, store, kept_layers=job.kept_layers, seed=self.options.seed)
        self.evaluation: Evaluation | None = None

    def run(self) -> TrainResult:
        job, progress = self.job, self.progress
        ceiling = gemm_flops(job.device, self.store.dtype, job.config.n_embd)
        log = MetricsLog(job.folder.metrics, job.folder.tensorboard, after_step=progress.step)
        with log, job.report.bar("train", job.steps, steps=True, every=self.options.logging_steps) as advance:
            for step in range(progress.step + 1, job.steps + 1):
                started = time.perf_counter()
                metrics, flops = self._step(step)
                seconds = time.perf_counter() - started
                metrics |= {
                    "tokens_per_second": metrics["tokens"] / seconds,
                    "seconds": seconds,
                    "gemm_share": flops / seconds / ceiling,
                    "peak_memory": peak_memory(job.device),
                    "epoch": job.batches.epoch,
                }
                log.write(step, metrics)
                advance(step, _line(metrics))
                last = step == job.steps
                if job.held_out and (last or step % job.eval_steps == 0):
                    log.write(step, self._evaluate(job.held_out, step, advance))
                if last or step % job.save_steps == 0:
                    self._save()
        return TrainResult(
            self.options.output, progress.step, progress.loss, self.evaluation, exported_step=self._export()
        )

    def _step(self, step: int) -> tuple[dict[str, float], float]:
        """One optimizer step; returns its metrics and its useful FLOPs."""
        options = self.options
        position = self.job.batches.state_dict()
        started = time.perf_counter()
        batches = self.job.batches.next_step()
        data_seconds = time.perf_counter() - started
        losses = self.executor.gradients(batches, step)
        norm = self.store.gradient_norm()
        if not math.isfinite(sum(losses) + norm):
            raise self._not_finite(step, losses, position)
        learning_rate = scheduled_learning_rate(
            step,
            peak=options.learning_rate,
            minimum=options.min_learning_rate,
            warmup_steps=options.warmup_steps,
            total_steps=self.job.steps,
            schedule=options.lr_scheduler_type,
        )
        self.store.apply(Update(step, learning_rate, clip_coefficient(norm, options.max_grad_norm)))
        targets = sum(batch.target_count for batch in batches)
        self.progress.step, self.progress.loss = step, sum(losses) / targets
        metrics = {
            "loss": self.progress.loss,
            "learning_rate": learning_rate,
            "grad_norm": norm,
            "tokens": sum(len(batch.input_ids) for batch in batches),
            "target_tokens": targets,
            "data_seconds": data_seconds,
        }
        return metrics, sum(
            self.job.config.training_flops(len(batch.input_ids), batch.target_count, batch.mean_context)
            for batch in batches
        )

    def _not_finite(self, step: int, losses: Sequence[float], position: dict[str, int]) -> UserError:
        """The weights are still those of the step before: keep them, and say what happened."""
        self.job.batches.load_state_dict(position)
        self._save()
        bad = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        what = f"the loss of micro-batch {bad} of {len(losses)}" if bad else "the gradient norm"
        return UserError(
            f"step {step}: {what} is not finite (sequences from {position['consumed_rows']} on in the data's order); "
            f"the state after step {step - 1} is saved: lower --learning-rate and --resume"
        )

    def _evaluate(self, held_out: HeldOut, step: int, advance: Advance) -> dict[str, float]:
        self.evaluation = evaluate_on(
            held_out,
            self.executor,
            self.options.micro_batch_size,
            lambda done, _: advance(step, f"evaluating {done:.0%}"),
        )
        loss = self.evaluation.loss
        self.job.report.note(
            f"step {step}: held-out loss {loss:.4f}, perplexity {self.evaluation.perplexity:.2f}, "
            f"{self.evaluation.bits_per_byte:.4f} bits per byte"
        )
        best = self.progress.best_loss
        if self.options.export == "best" and (best is None or loss < best):
            self.progress.best_loss, self.progress.best_step = loss, step
            self._write(self._best())
        return {
            "eval_loss": loss,
            "eval_perplexity": self.evaluation.perplexity,
            "eval_bits_per_byte": self.evaluation.bits_per_byte,
        }

    def _best(self) -> Path:
        return self.job.folder.best / f"step-{self.progress.best_step:08}"

    def _save(self) -> None:
        state = {"data": self.job.batches.state_dict(), "progress": asdict(self.progress)}
        save_checkpoint(
            self.job.folder.checkpoints, self.progress.step, self.store, state, self.options.save_total_limit
        )
        # the best weights of before can go only now that no checkpoint to resume from names them
        for other in set(self.job.folder.best.glob("step-*")) - {self._best()}:
            shutil.rmtree(other)

    def _export(self) -> int:
        """Publish the weights in the run folder; returns the step they are of."""
        folder = self.job.folder
        if self.options.export == "best" and self._best().is_dir():
            folder.publish(self._best())
            return self.progress.best_step
        self._write(folder.last)
        folder.publish(folder.last)
        return self.progress.step

    def _write(self, folder: Path) -> None:
        source = self.job.source
        dtype = {
            "auto": source.dtype if source else torch.float32,
            "float32": torch.float32,
            "float16": torch.float16,
            "bfloat16": torch.bfloat16,
        }[self.options.save_dtype]
        write_folder(
            folder,
            self.job.config,
            self.store,
            dtype=dtype,
            carried_files=tokenizer_files.files(self.job.tokenizer_folder),
            source=source.folder if source else None,
        )


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(
        (
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['learning_rate']:.2e}",
            f"norm {metrics['grad_norm']:.2f}",
            f"{metrics['tokens_per_second']:,.0f} tokens/s",
            f"{metrics['gemm_share']:.0%} of GEMM",
            gib(metrics["peak_memory"]),
        )
    )
