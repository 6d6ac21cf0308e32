"""All of GPT-J-6B trained on real text inside a memory cgroup: peak, speed, disk, and what the step waits for.

    python benchmarks/full_size.py --work FOLDER --memory 20GiB --tokens 4096 --steps 3

    python benchmarks/full_size.py --work FOLDER --memory 100GiB --device-memory 16GiB --tokens 16384

FOLDER, on a fast disk with 75 GB to spare, gets a checkpoint of random weights (12 GB, made layer by layer, kept for
the next call), the text and the run. Needs root, for the cgroup; page cache counts towards its limit. The ceiling of
matrix products is timed by the run itself before its first step, and by this script in the same cgroup after the last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from gptj_stream.checkpoint.folder import write_folder
from gptj_stream.config import PRESETS, ModelConfig
from gptj_stream.data.tokenizer import files, train_tokenizer
from gptj_stream.executor import model_layouts
from gptj_stream.layout import Slot
from gptj_stream.model import initialize
from gptj_stream.options import EvaluateOptions
from gptj_stream.report import ConsoleReport


def fresh_weights(config: ModelConfig) -> Iterator[tuple[Slot, str, list[Tensor]]]:
    """Random weights, a parameter at a time.

    Matrices are cut at random places from one sheet of 16 M normal numbers: drawing 6 billion takes half an hour.
    """
    generator = torch.Generator().manual_seed(0)
    sheet = torch.randn(1 << 24, generator=generator)
    for layout in model_layouts(config):
        for slot in layout.slots:
            weight = torch.empty(slot.shape)
            if weight.dim() < 2:
                initialize(slot.name, weight, config, generator)
            else:
                std = config.n_embd**-0.5 * (2 / config.n_layer if "out" in slot.local else 1.0)
                offset = int(torch.randint(len(sheet), (), generator=generator))
                for piece in weight.flatten().split(len(sheet)):
                    torch.mul(sheet.roll(offset)[: len(piece)], std, out=piece)
            yield slot, "fresh", [weight]


def prepare(work: Path, config: ModelConfig) -> tuple[Path, Path]:
    """The checkpoint and the text, made where they are not there yet."""
    text, model = work / "text", work / f"model-{config.n_layer}x{config.n_embd}"
    if not text.is_dir():
        text.mkdir(parents=True)
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            shutil.copyfile(path, text / f"{path.stem}.txt")
    if not (model / "config.json").is_file():
        tokenizer = work / "tokenizer"
        if not tokenizer.is_dir():
            train_tokenizer((path.read_text(encoding="utf-8") for path in sorted(text.iterdir())), 8192, tokenizer)
        write_folder(
            model,
            config,
            fresh_weights(config),
            dtype=torch.bfloat16,
            carried_files=files(tokenizer),
            report=ConsoleReport(),
        )
    return model, text


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A cgroup with a hard limit and no swap; its folder, v2 or v1."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").is_file()
    group = (root if v2 else root / "memory") / f"gptj-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(limit))
        yield group
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def run_in(group: Path, command: list[str]) -> tuple[int, dict[str, int]]:
    """Run the command in the cgroup; its exit code, and the bytes that went to and from the disk."""
    enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    process = subprocess.Popen([*enter, *command])
    io: dict[str, int] = {}

    def watch() -> None:
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/io").read_text()
                io.update({key: int(value) for key, value in (line.split(": ") for line in text.splitlines())})
            except OSError:
                return
            time.sleep(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    return code, io


@dataclass(frozen=True)
class Result:
    """Bytes and seconds; medians over the steps where nothing else is said."""

    peak: int
    resident: int
    planned_memory: int
    seconds: list[float]
    planned_seconds: float
    tokens_per_second: float
    gemm_share: float
    wait_share: float
    update_share: float
    disk_read: int
    disk_written: int
    least_free_disk: int
    losses: list[float]


def train(
    work: Path,
    config: ModelConfig,
    *,
    memory: str,
    tokens: int,
    sequence_length: int,
    steps: int,
    headroom: str = "0.5GiB",
    more: Sequence[str] = (),
) -> Result:
    """One run of `gptj train` from a file store, inside a cgroup of `memory`; its options say `headroom` less."""
    model, text = prepare(work, config)
    limits = EvaluateOptions(model=model, data=(text,), memory=memory, device_memory=headroom)  # reads the sizes
    assert limits.memory
    assert limits.device_memory
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "gptj_stream", "train", "--model", str(model), "--data", str(text)),
        *("--output", str(output), "--memory", str(limits.memory - limits.device_memory), "--store", "file"),
        *("--max-steps", str(steps), "--global-batch-size", str(tokens // sequence_length)),
        *("--micro-batch-size", "1", "--sequence-length", str(sequence_length), "--packing", "concat"),
        *("--logging-steps", "1", "--learning-rate", "1e-7", "--save-dtype", "bfloat16"),
        *more,
    ]
    least = shutil.disk_usage(work).free
    done = threading.Event()

    def watch_disk() -> None:
        nonlocal least
        while not done.wait(1):
            least = min(least, shutil.disk_usage(work).free)

    watcher = threading.Thread(target=watch_disk)
    watcher.start()
    try:
        with memory_cgroup(limits.memory) as group:
            code, io = run_in(group, command)
            peak_file = group / ("memory.peak" if (group / "memory.peak").exists() else "memory.max_usage_in_bytes")
            peak = int(peak_file.read_text())
    finally:
        done.set()
        watcher.join()
    if code:
        raise SystemExit(f"gptj train ended with exit code {code}")
    lines = (output / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "tokens_per_second" in row]
    shutil.rmtree(output)
    return Result(
        peak=peak,
        resident=max(row["peak_memory"] for row in rows),
        planned_memory=rows[0]["planned_memory"],
        seconds=[row["seconds"] for row in rows],
        planned_seconds=rows[0]["planned_seconds"],
        tokens_per_second=median(row["tokens_per_second"] for row in rows),
        gemm_share=median(row["gemm_share"] for row in rows),
        wait_share=median(row["wait_seconds"] / row["seconds"] for row in rows),
        update_share=median(row["update_seconds"] / row["seconds"] for row in rows),
        disk_read=io["read_bytes"],
        disk_written=io["write_bytes"],
        least_free_disk=least,
        losses=[row["loss"] for row in rows],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--memory", default="20GiB", help="of the cgroup")
    parser.add_argument("--tokens", type=int, default=4096, help="a step, in sequences of 2048, one at a time")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device-memory", help="train on CUDA, from the host store, within so much")
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    config = PRESETS["gpt-j-6b"]
    more: list[str] = []
    if arguments.trace:
        more += ["--trace", str(arguments.trace)]
    if arguments.device_memory:  # of an option given twice the last one counts
        more += ["--device", "cuda", "--device-memory", arguments.device_memory, "--store", "host"]
    result = train(
        arguments.work,
        config,
        memory=arguments.memory,
        tokens=arguments.tokens,
        sequence_length=2048,
        steps=arguments.steps,
        more=more,
    )
    step = median(result.seconds)
    rows = {
        "peak of the cgroup, page cache counted": f"{result.peak / 2**30:.2f} GiB",
        "peak resident memory, planned": f"{result.resident / 2**30:.2f} GiB, {result.planned_memory / 2**30:.2f} GiB",
        "seconds of each step": ", ".join(f"{seconds:.0f}" for seconds in result.seconds),
        "median, planned": f"{step:.0f} s, {result.planned_seconds:.0f} s",
        "tokens/s": f"{result.tokens_per_second:.1f}",
        "share of the GEMM ceiling, timed before the first step": f"{result.gemm_share:.1%}",
        "waiting for weights and gradients": f"{result.wait_share:.2%} of a step",
        "update": f"{result.update_share:.2%} of a step",
        "read, written, whole process": f"{result.disk_read / 1e9:.0f} GB, {result.disk_written / 1e9:.0f} GB",
        "least free disk during the run": f"{result.least_free_disk / 1e9:.1f} GB",
        "losses": ", ".join(f"{loss:.4f}" for loss in result.losses),
    }
    print(
        f"\n| {config.parameters:,} parameters, {arguments.tokens:,} tokens a step, {arguments.memory} | |\n|---|---|"
    )
    for what, value in rows.items():
        print(f"| {what} | {value} |")


if __name__ == "__main__":
    main()
