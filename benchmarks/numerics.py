"""Whether weights and moments kept in less than fp32 still learn what fp32 learns.

One small GPT-J, the same data in the same order, and three ways to keep the weights between steps. Two trainings: from
fresh weights at 1e-3 on the standard library's modules, and on from the fp32 result at 6e-6 on the language reference
(the text behind Python's `help()`). Arithmetic is bf16 where the machine multiplies it natively.

    python -m benchmarks.numerics
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from demo.corpus import is_held_out, modules_of_the_library
from matplotlib.axes import Axes
from rich.console import Console
from torch import Tensor

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.data.batches import Batches, evaluation_batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import TokenDataset
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.layout import Layout
from gptj_stream.machine import resolve_device, resolve_dtype
from gptj_stream.optim import AdamW, Optimizer, Part, Update, clip_coefficient, scheduled_learning_rate
from gptj_stream.optim.compact import CompactAdamW
from gptj_stream.options import PrepareOptions, TokenizerOptions
from gptj_stream.prepare import prepare, train_bpe
from gptj_stream.pretrained import fill_fresh
from gptj_stream.store import ResidentStore

LENGTH = 256
HELD_OUT_ROWS = 48
WARMUP_STEPS = 20
START = "start.pt"
EVALUATIONS = 12
LAST = 3
"""A run's result is the mean of so many last evaluations."""

console = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class NearestAdamW:
    """AdamW with weights kept in bf16, rounded to the nearest: what fails at small learning rates."""

    inner: AdamW = field(default_factory=AdamW)

    gradient_dtype: ClassVar[torch.dtype] = torch.float32

    def parts(self, layout: Layout) -> dict[str, Part]:
        return self.inner.parts(layout) | {"weight": Part(layout.numel, torch.bfloat16)}

    def set_weights(self, state: dict[str, Tensor], weights: Tensor) -> None:
        state["weight"].copy_(weights)

    def weights(self, state: dict[str, Tensor]) -> Tensor:
        return state["weight"].float()

    def update(self, layer: int, layout: Layout, state: dict[str, Tensor], gradient: Tensor, update: Update) -> None:
        exact = state | {"weight": self.weights(state)}
        self.inner.update(layer, layout, exact, gradient, update)
        self.set_weights(state, exact["weight"])


ARMS = ("fp32", "compact", "bf16 nearest")
STYLES: dict[str, dict[str, Any]] = {
    "fp32": {"color": "#4d4d4d", "lw": 1.6},
    "compact": {"color": "#0072b2", "lw": 1.6, "ls": (0, (4, 2))},  # dashed: it lies on fp32's line where it is good
    "bf16 nearest": {"color": "#d55e00", "lw": 1.6},
}


def optimizer_of(arm: str, seed: int) -> Optimizer:
    if arm == "fp32":
        return AdamW()
    if arm == "bf16 nearest":
        return NearestAdamW()
    return CompactAdamW(seed=seed)


@dataclass(frozen=True)
class Study:
    """One kind of training.

    Attributes:
        data: what its token folders' names begin with.
    """

    title: str
    learning_rate: float
    data: str


FRESH = Study("fresh weights at 1e-3", 1e-3, "modules")
FINE_TUNING = Study("fine-tuning at 6e-6", 6e-6, "reference")


@dataclass(frozen=True)
class Run:
    """One training: what a worker process needs to know."""

    study: Study
    arm: str
    seed: int
    work: Path
    config: ModelConfig
    steps: int
    batch: int
    threads: int

    @property
    def saves(self) -> bool:
        """Whether it leaves the weights that fine-tuning begins with."""
        return (self.study, self.arm, self.seed) == (FRESH, ARMS[0], 0)


@dataclass(frozen=True)
class Result:
    """What a run showed.

    Attributes:
        losses: held-out loss by step, from before the first one.
        moved: |last weights - first weights| / |first weights|, over all parameters.
    """

    run: Run
    losses: dict[int, float]
    moved: float
    seconds: float

    @property
    def last(self) -> float:
        return mean(list(self.losses.values())[-LAST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {LENGTH} tokens a step")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--arms", nargs="+", choices=ARMS[1:], default=ARMS[1:], help="to compare with fp32")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else os.cpu_count() or 1)
    parser.add_argument("--plot", type=Path, default=Path("docs/numerics.svg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = write_tokens(work, arguments.vocab_size)
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=LENGTH,
            n_embd=arguments.width,
            n_layer=arguments.layers,
            n_head=max(1, arguments.width // 64),
            rotary_dim=16,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
        fresh, fine_tuning = (
            [
                Run(study, arm, seed, work, config, arguments.steps, arguments.batch, threads)
                for seed in range(arguments.seeds)
                for arm in (ARMS[0], *arguments.arms)
            ]
            for study in (FRESH, FINE_TUNING)
        )
        console.print(f"{config.parameters:,} parameters, {2 * len(fresh)} runs of {arguments.steps} steps")
        started = time.perf_counter()
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            running = [pool.submit(train, run) for run in fresh]
            running[0].result()  # its weights are where all fine-tuning begins
            running += [pool.submit(train, run) for run in fine_tuning]
            results = [each.result() for each in running]
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes of training")
    print(markdown(results))
    draw(results, arguments.plot)


def write_tokens(work: Path, vocab_size: int) -> Tokenizer:
    """Train and held-out tokens of both studies; the tokenizer comes from the first one's training text."""
    texts = {
        "modules": [(is_held_out(name), text) for name, text in modules_of_the_library()],
        "reference": [(index % 5 == 0, text) for index, text in enumerate(reference())],
    }
    for data, pairs in texts.items():
        for part in ("train", "held-out"):
            records = (json.dumps({"text": text}) for held_out, text in pairs if held_out == (part == "held-out"))
            (work / f"{data}-{part}.jsonl").write_text("\n".join(records), encoding="utf-8")
    source = work / "modules-train.jsonl"
    tokenizer = train_bpe(TokenizerOptions(data=(source,), vocab_size=vocab_size, output=work / "tokenizer"))
    for path in sorted(work.glob("*.jsonl")):
        prepare(PrepareOptions(tokenizer=work / "tokenizer", data=(path,), output=path.with_suffix("")))
    return tokenizer


def reference() -> Iterator[str]:
    """The language reference's topics. They repeat each other's paragraphs: each stands in the first that has it."""
    seen: set[str] = set()
    for _, text in sorted(topics.items()):
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph not in seen]
        seen.update(paragraphs)
        if paragraphs:
            yield "\n\n".join(paragraphs)


def train(run: Run) -> Result:
    torch.set_num_threads(run.threads)
    started = time.perf_counter()
    device = resolve_device("auto")
    optimizer = optimizer_of(run.arm, run.seed)
    layouts = model_layouts(run.config)
    store = ResidentStore(layouts, device=device, dtype=resolve_dtype("auto", device), optimizer=optimizer)
    if run.study == FRESH:
        fill_fresh(store, run.config, run.seed)
    else:
        for layer, flat in enumerate(torch.load(run.work / START)):
            store.load(layer, flat)
    executor = Executor(run.config, store, kept_layers=run.config.n_layer, seed=run.seed)
    tokens = TokenDataset.open(run.work / f"{run.study.data}-train")
    batches = Batches(tokens, pack(tokens, LENGTH, "concat"), run.batch, run.batch, run.seed)
    held_out = held_out_batches(run)

    def weights() -> Tensor:
        return torch.cat([optimizer.weights(store.read(layer)).cpu() for layer in range(len(layouts))])

    first = weights()
    losses = {0: held_out_loss(executor, held_out)}
    for step in range(1, run.steps + 1):
        executor.gradients(batches.next_step(), step)
        learning_rate = scheduled_learning_rate(
            step,
            peak=run.study.learning_rate,
            minimum=0.0,
            warmup_steps=WARMUP_STEPS,
            total_steps=run.steps,
            schedule="cosine",
        )
        store.apply(Update(step, learning_rate, clip_coefficient(store.gradient_norm(), 1.0)))
        if step * EVALUATIONS // run.steps > (step - 1) * EVALUATIONS // run.steps:
            losses[step] = held_out_loss(executor, held_out)
    last = weights()
    if run.saves:
        torch.save(last.split([layout.numel for layout in layouts]), run.work / START)
    store.close()
    result = Result(run, losses, float((last - first).norm() / first.norm()), time.perf_counter() - started)
    console.print(
        f"{run.study.title}, seed {run.seed}, {run.arm}: {losses[0]:.4f} -> {result.last:.4f}, "
        f"moved {result.moved:.3%}, {result.seconds:.0f} s"
    )
    return result


def held_out_batches(run: Run) -> list[MicroBatch]:
    """About `HELD_OUT_ROWS` rows, spread evenly over the held-out text."""
    tokens = TokenDataset.open(run.work / f"{run.study.data}-held-out")
    batches = list(evaluation_batches(tokens, pack(tokens, LENGTH, "concat"), run.batch))
    return batches[:: max(1, len(batches) * run.batch // HELD_OUT_ROWS)]


def held_out_loss(executor: Executor, batches: Sequence[MicroBatch]) -> float:
    total = sum(executor.token_losses(batch).sum(dtype=torch.float64).item() for batch in batches)
    return total / sum(batch.target_count for batch in batches)


def markdown(results: Sequence[Result]) -> str:
    lines = [
        "| training | weights kept as | held-out loss, by seed | mean ± spread | minus fp32, same seed | "
        "in fp32's spreads | weights moved |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in (FRESH, FINE_TUNING):
        groups = by_arm(results, study)
        reference = [result.last for result in groups[ARMS[0]]]
        for arm, group in groups.items():
            last = [result.last for result in group]
            cells = [study.title, arm, ", ".join(f"{loss:.4f}" for loss in last), spread_text(last, "")]
            if arm == ARMS[0]:
                cells += ["", ""]
            else:
                differences = [loss - fp32 for loss, fp32 in zip(last, reference, strict=True)]
                cells += [spread_text(differences, "+"), f"{mean(differences) / spread(reference):+.1f}"]
            cells.append(f"{mean(result.moved for result in group):.3%}")
            lines.append(f"| {' | '.join(cells)} |")
    before = mean(result.losses[0] for result in by_arm(results, FINE_TUNING)[ARMS[0]])
    return "\n".join([*lines, "", f"Fine-tuning begins at {before:.4f}."])


def by_arm(results: Sequence[Result], study: Study) -> dict[str, list[Result]]:
    """A study's results, each arm's in the order of the seeds."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.run.study == study:
            groups.setdefault(result.run.arm, []).append(result)
    return groups


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation."""
    return stdev(values) if len(values) > 1 else float("nan")


def spread_text(values: Sequence[float], sign: str) -> str:
    return f"{mean(values):{sign}.4f} ± {spread(values):.4f}"


def draw(results: Sequence[Result], path: Path) -> None:
    """Above the losses; below how far each is from fp32's of the same seed, with fp32's own spread around zero."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": ""})
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex="col", height_ratios=(3, 2), layout="constrained")
    for (above, below), study in zip(axes.T, (FRESH, FINE_TUNING), strict=True):
        groups = by_arm(results, study)
        steps = list(groups[ARMS[0]][0].losses)
        fp32 = curves(groups[ARMS[0]])
        for arm, group in groups.items():
            losses = curves(group)
            plot_band(above, steps, losses, arm)
            plot_band(below, steps, losses - (fp32.mean(0) if arm == ARMS[0] else fp32), arm)
        above.set_title(study.title, fontsize=10, fontweight="bold")
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("held-out loss")
    axes[1, 0].set_ylabel("minus fp32, same seed")
    axes[0, 0].legend(title="weights kept as", frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25, lw=0.6)
    figure.savefig(path, dpi=150)


def curves(group: Sequence[Result]) -> npt.NDArray[np.float64]:
    """(seeds, evaluations)."""
    return np.array([list(result.losses.values()) for result in group])


def plot_band(axis: Axes, steps: list[int], values: npt.NDArray[np.float64], arm: str) -> None:
    """The mean over seeds, and their sample standard deviation around it."""
    middle, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
    axis.plot(steps, middle, label=arm, **STYLES[arm])
    axis.fill_between(steps, middle - width, middle + width, color=STYLES[arm]["color"], alpha=0.18, lw=0)


if __name__ == "__main__":
    main()
