"""Full-size conversions beside `cp` of the same bytes: seconds, ratio, and peak memory inside a memory cgroup.

    python -m benchmarks.convert --work FOLDER

FOLDER needs 40 GB. GPT-J-6B's shape with random bf16 weights is made in one format after another (safetensors, PyTorch
zip, mesh-transformer-jax in 8 shards) and converted to bf16 safetensors. Page caches are dropped before every command,
both are followed by a sync, and they take turns. Needs root, for the caches and the cgroup.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from benchmarks.full_size import memory_cgroup, prepare
from safetensors import safe_open
from torch import Tensor

from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.config import PRESETS, ModelConfig

SHARDS = 8


def measured(command: list[str], group: Path | None = None) -> tuple[float, int]:
    """Seconds with the sync behind it, from cold caches, and the peak of resident memory in bytes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    if group:
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    messages = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)}\n{messages}")
    return seconds, usage.ru_maxrss * 1024


def tensors(model: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def pytorch(model: Path, folder: Path) -> None:
    """One `pytorch_model.bin`, as GPT-J's own repository has it."""
    torch.save(dict(tensors(model)), folder / "pytorch_model.bin")


def mesh(model: Path, folder: Path, config: ModelConfig) -> None:
    """Slim shards in bf16. Of summed biases all but the first shard's part are zero."""
    source = Checkpoint(model)

    def whole(name: str) -> np.ndarray:
        tensor = source.tensors[name]
        rows = torch.cat([tensor.read_rows(start, stop) for start, stop in tensor.steps()])
        return rows.view(torch.int16).numpy().view("V2")

    def cut(name: str, axis: int, shard: int) -> np.ndarray:
        return np.ascontiguousarray(np.split(whole(name).T, SHARDS, axis=axis)[shard])

    def once(name: str, shard: int) -> np.ndarray:
        return whole(name) if shard == 0 else np.zeros(config.n_embd, "i2").view("V2")

    for shard in range(SHARDS):
        leaves: list[np.ndarray] = [np.zeros(config.n_embd, "i2").view("V2")]
        leaves.append(np.ascontiguousarray(np.split(whole("transformer.wte.weight"), SHARDS)[shard]))
        for layer in sorted(range(config.n_layer), key=str):
            block = f"transformer.h.{layer}."
            leaves += [cut(f"{block}attn.{part}_proj.weight", 1, shard) for part in "qvk"]
            leaves.append(cut(f"{block}attn.out_proj.weight", 0, shard))
            leaves.append(np.split(whole(f"{block}mlp.fc_in.bias"), SHARDS)[shard])
            leaves.append(cut(f"{block}mlp.fc_in.weight", 1, shard))
            leaves.append(once(f"{block}mlp.fc_out.bias", shard))
            leaves.append(cut(f"{block}mlp.fc_out.weight", 0, shard))
            leaves += [whole(f"{block}ln_1.{part}") for part in ("bias", "weight")]
        leaves.append(np.split(whole("lm_head.bias"), SHARDS)[shard])
        leaves.append(cut("lm_head.weight", 1, shard))
        leaves += [whole(f"transformer.ln_f.{part}") for part in ("bias", "weight")]
        leaves.append(np.array(383_500, np.int32))
        (folder / f"shard_{shard}").mkdir()
        size, longer = divmod(len(leaves), 16)
        start = 0
        for piece in range(16):
            stop = start + size + (piece < longer)
            np.savez(folder / f"shard_{shard}" / f"{piece}.npz", *leaves[start:stop])
            start = stop
        print(f"  shard {shard + 1} of {SHARDS}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["safetensors", "pytorch", "mesh"])
    arguments = parser.parse_args()
    config, work = PRESETS["gpt-j-6b"], arguments.work
    model, _ = prepare(work, config)
    gptj = [sys.executable, "-m", "gptj_stream"]
    _, interpreter = measured([*gptj, "inspect", str(model)])
    limit = interpreter + (1 << 30)
    rows = []
    for name in arguments.formats:
        source = model if name == "safetensors" else work / f"source-{name}"
        if source != model:
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir()
            if name == "pytorch":
                shutil.copy(model / "config.json", source)
                pytorch(model, source)
            else:
                mesh(model, source, config)
        copied, converted, peaks = [], [], []
        for _ in range(arguments.turns):
            seconds, _ = measured(["cp", "-r", str(source), str(work / "copy")])
            copied.append(seconds)
            shutil.rmtree(work / "copy")
            with memory_cgroup(limit) as group:
                seconds, peak = measured([*gptj, "convert", str(source), str(work / "converted")], group)
            converted.append(seconds)
            peaks.append(peak)
            if len(converted) < arguments.turns:
                shutil.rmtree(work / "converted")
        verified = subprocess.run(
            [*gptj, "verify", str(model), str(work / "converted"), "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        equal = json.loads(verified.stdout)["equal"]
        shutil.rmtree(work / "converted")
        if source != model:
            shutil.rmtree(source)
        ratios = [ours / theirs for ours, theirs in zip(converted, copied, strict=True)]
        rows.append(
            f"| {name} | {median(copied):.1f} | {median(converted):.1f} | {median(ratios):.2f} "
            f"({min(ratios):.2f} - {max(ratios):.2f}) | {(max(peaks) - interpreter) / 2**30:.2f} GiB | {equal} |"
        )
        print(rows[-1], flush=True)
    print(f"\ncgroup of {limit / 2**30:.2f} GiB, page cache counted; the interpreter alone {interpreter / 2**30:.2f}\n")
    print("| from | cp, s | convert, s | convert / cp: median (min - max) | peak above the interpreter's | equal |")
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
