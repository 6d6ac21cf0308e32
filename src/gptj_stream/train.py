"""The training job: one loop for every store, precision and set of data."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gptj_stream.checkpoint.folder import stored_weights, write_folder
from gptj_stream.checkpoint.native import save_checkpoint
from gptj_stream.data import tokenizer as tokenizer_files
from gptj_stream.errors import UserError
from gptj_stream.evaluate import Evaluation, HeldOut, evaluate_on
from gptj_stream.executor import Executor
from gptj_stream.job import Job, Progress, open_job, open_store, run_state, saved_dtype
from gptj_stream.machine import gemm_flops, peak_memory
from gptj_stream.metrics import MetricsLog
from gptj_stream.optim import Update, clip_coefficient, scheduled_learning_rate
from gptj_stream.options import TrainOptions
from gptj_stream.report import Advance, Report, gib
from gptj_stream.store import FileHome, Store


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


def train(options: TrainOptions, report: Report | None = None) -> TrainResult:
    """Train, and leave the run folder as a checkpoint that transformers loads.

    Raises:
        UserError: bad input, or a loss that is not finite; the message says what, and how to go on.
    """
    job = open_job(options, report or Report())
    store, progress = open_store(job)
    with closing(store):
        return _Loop(job, store, progress).run()


_TRACED_STEPS = 3
"""A trace's file is written after each of the first steps; in the later ones it would say the same."""


class _Ceiling:
    """Matrix products' FLOP/s, timed again every few minutes: processes and virtual machines share what there is."""

    def __init__(self, measure: Callable[[], float]) -> None:
        self._measure = measure
        self._value, self._timed = measure(), time.monotonic()

    def __call__(self) -> float:
        """The mean of the last two timings, if one is due, else the last."""
        if time.monotonic() - self._timed < _CEILING_SECONDS:
            return self._value
        before, self._value = self._value, self._measure()
        self._timed = time.monotonic()
        return (before + self._value) / 2


_CEILING_SECONDS = 180


class _Loop:
    def __init__(self, job: Job, store: Store, progress: Progress) -> None:
        self.job, self.store, self.progress = job, store, progress
        self.options = job.options
        dropout = self.options.dropout
        config = job.config if dropout is None else job.config.with_dropout(dropout)
        plan = job.plan
        self.executor = Executor(
            config, store, kept_layers=plan.kept_layers, narrow_layers=plan.narrow_layers, seed=self.options.seed
        )
        self.evaluation: Evaluation | None = None
        self._saved_best = self._best()  # the best weights that the newest checkpoint names

    def run(self) -> TrainResult:
        job, progress = self.job, self.progress
        ceiling = _Ceiling(lambda: gemm_flops(job.plan.device, self.store.dtype, job.config.n_embd))
        plan = job.plan
        planned = {
            "planned_seconds": sum(plan.seconds(job.speed).values()),
            "planned_memory": sum((plan.device_memory() or plan.memory()).values()),
        }
        log = MetricsLog(job.folder.metrics, job.folder.tensorboard, after_step=progress.step)
        with log, job.report.bar("train", job.steps, steps=True, every=self.options.logging_steps) as advance:
            first = progress.step + 1
            if progress.step:  # a store goes on from its last step, which may have been killed in its evaluation
                self._evaluate_if_due(progress.step, log, advance)
            for step in range(first, job.steps + 1):
                started = time.perf_counter()
                self.store.trace.reset()
                with self.store.trace.span("step", "step", step=step):
                    metrics, flops = self._step(step)
                seconds = time.perf_counter() - started
                metrics |= {
                    "tokens_per_second": metrics["tokens"] / seconds,
                    "seconds": seconds,
                    "gemm_share": flops / seconds / ceiling(),
                    "peak_memory": peak_memory(job.plan.device),
                    **planned,
                    "wait_seconds": self.store.trace.seconds("wait"),
                    "update_seconds": self.store.trace.seconds("update"),
                    "epoch": job.batches.epoch,
                }
                if self.options.trace and step < first + _TRACED_STEPS:
                    self.store.trace.write(self.options.trace)
                log.write(step, metrics)
                advance(step, _line(metrics))
                self._evaluate_if_due(step, log, advance)
                if step == job.steps or step % job.save_steps == 0:
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
        targets = sum(batch.target_count for batch in batches)
        self.progress.step, self.progress.loss = step, sum(losses) / targets
        update = Update(step, learning_rate, clip_coefficient(norm, options.max_grad_norm))
        self.store.apply(update, run_state(self.job, self.progress))
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
        self._save(limit=self.options.save_total_limit + 1)  # no older one goes for this
        bad = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
        what = f"the loss of micro-batch {bad} of {len(losses)}" if bad else "the gradient norm"
        return UserError(
            f"step {step}: {what} is not finite (sequences from {position['consumed_rows']} on in the data's order); "
            f"the state after step {step - 1} is saved: lower --learning-rate and --resume, "
            f"from an older checkpoint if {self.job.folder.checkpoints} has its newest removed"
        )

    def _evaluate_if_due(self, step: int, log: MetricsLog, advance: Advance) -> None:
        job = self.job
        due = step == job.steps or step % job.eval_steps == 0
        if job.held_out and due and self.progress.evaluated_step < step:
            log.write(step, self._evaluate(job.held_out, step, advance))

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
            self._keep_best(self._saved_best, self._best())
        self.progress.evaluated_step = step
        if isinstance(self.store.home, FileHome):
            self._save()
        return {
            "eval_loss": loss,
            "eval_perplexity": self.evaluation.perplexity,
            "eval_bits_per_byte": self.evaluation.bits_per_byte,
        }

    def _best(self) -> Path:
        return self.job.folder.best / f"step-{self.progress.best_step:08}"

    def _save(self, limit: int | None = None) -> None:
        state = run_state(self.job, self.progress)
        if isinstance(self.store.home, FileHome):
            self.store.home.annotate(state)  # the store is its own checkpoint
        else:
            limit = limit or self.options.save_total_limit
            save_checkpoint(self.job.folder.checkpoints, self.progress.step, self.store, state, limit)
        # the best weights of before can go only now that no checkpoint to resume from names them
        self._saved_best = self._best()
        self._keep_best(self._saved_best)

    def _keep_best(self, *folders: Path) -> None:
        for other in set(self.job.folder.best.glob("step-*")) - {*folders}:
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
        write_folder(
            folder,
            self.job.config,
            stored_weights(self.store),
            dtype=saved_dtype(self.options, source),
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
