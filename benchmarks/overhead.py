"""Streamed over resident: tokens/s of the same steps, turn by turn, over the number of tokens a step.

    python benchmarks/overhead.py --store FOLDER --plot docs/overhead.svg
    python benchmarks/overhead.py --device cuda --tokens 4096 16384 --length 2048

On a CPU the streamed store is a file store in FOLDER, on a fast disk with 5 GB to spare, which is made and removed;
both keep the compact state and compute the same bits, and no layer is kept in memory. On CUDA it is the host store;
both keep the fp32 state.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

import torch

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.machine import gemm_flops, resolve_device, resolve_dtype
from gptj_stream.optim import AdamW, Update
from gptj_stream.optim.compact import CompactAdamW
from gptj_stream.store import FileHome, Home, MemoryHome, ResidentStore, Store, state_parts
from gptj_stream.store.file_home import Owner

CPU = torch.device("cpu")


def stores(config: ModelConfig, device: torch.device, dtype: torch.dtype, folder: Path) -> dict[str, Store]:
    layouts = model_layouts(config)
    optimizer = CompactAdamW() if device.type == "cpu" else AdamW()
    parts, owner = state_parts(layouts, dtype, optimizer), Owner("", "", "", "")
    home: Home
    if device.type == "cpu":
        home = FileHome(folder, parts, gradient_dtype=optimizer.gradient_dtype, owner=owner)
    else:
        home = MemoryHome(parts, device=CPU, pinned=True)
    made = {
        "resident": ResidentStore(layouts, device=device, dtype=dtype, optimizer=optimizer),
        "streamed": Store(layouts, home, device=device, dtype=dtype, optimizer=optimizer),
    }
    for layer, layout in enumerate(layouts):
        weights = torch.randn(layout.numel) * config.n_embd**-0.5
        for store in made.values():
            store.load(layer, weights)
    return made


def step(store: Store, config: ModelConfig, tokens: int, length: int, number: int, kept: int) -> tuple[float, float]:
    """Seconds of a step, and of waiting in it."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(config.vocab_size, (tokens // length, length), generator=generator)
    batches = [MicroBatch(row, row.roll(-1), (length,)) for row in ids]
    store.trace.reset()
    started = time.perf_counter()
    Executor(config, store, kept_layers=kept).gradients(batches, number)
    norm = store.gradient_norm()
    store.apply(Update(number, 1e-5, min(1.0, 1 / norm)))
    if store.device.type == "cuda":
        torch.cuda.synchronize(store.device)
    return time.perf_counter() - started, store.trace.seconds("wait")


def plot(rows: list[tuple[int, float, float, float]], path: Path) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    tokens = [row[0] for row in rows]
    axis.plot(tokens, [row[2] / row[1] for row in rows], "o-", label="streamed over resident, tokens/s")
    axis.plot(tokens, [1 - row[3] for row in rows], "s--", label="1 - share of the step spent waiting")
    axis.axhline(0.97, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="tokens a step", xticks=tokens, xticklabels=[f"{each:,}" for each in tokens])
    axis.set_ylim(top=1.05)
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--store", type=Path, default=Path("overhead-store"))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence and micro-batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    config = ModelConfig(
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // 256,
        vocab_size=8192,
        bos_token_id=0,
        eos_token_id=0,
    )
    device = resolve_device(arguments.device)
    dtype = resolve_dtype("auto", device)
    both = stores(config, device, dtype, arguments.store)
    rows = []
    number = 0
    print("| tokens a step | resident tokens/s | streamed tokens/s | streamed / resident, turn by turn | waiting |")
    print("|---|---|---|---|---|")
    for tokens in arguments.tokens:
        seconds: dict[str, list[float]] = {name: [] for name in both}
        waited: list[float] = []
        for turn in range(arguments.turns + 1):
            number += 1
            for name, store in both.items():
                elapsed, waiting = step(store, config, tokens, arguments.length, number, config.n_layer)
                if turn:  # the first compiles kernels
                    seconds[name].append(elapsed)
                    if name == "streamed":
                        waited.append(waiting / elapsed)
        ratios = [a / b for a, b in zip(seconds["resident"], seconds["streamed"], strict=True)]
        speeds = {name: tokens / median(each) for name, each in seconds.items()}
        rows.append((tokens, 1.0, median(ratios), median(waited)))
        print(
            f"| {tokens:,} | {speeds['resident']:.1f} | {speeds['streamed']:.1f} | {median(ratios):.3f} "
            f"({min(ratios):.3f} - {max(ratios):.3f}) | {median(waited):.1%} |",
            flush=True,
        )
    print(
        f"\n{config.parameters:,} parameters; GEMM ceiling "
        f"{gemm_flops(device, dtype, config.n_embd) / 1e9:,.0f} GFLOP/s"
    )
    for store in both.values():
        store.close()
    shutil.rmtree(arguments.store, ignore_errors=True)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
