"""One layer's optimizer step in CPU memory: ours, PyTorch's, and a copy of as many bytes as ours reads and writes.

python benchmarks/update_kernel.py --parameters 201400000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import torch
from torch import Tensor

from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Update
from gptj_stream.optim.base import Optimizer
from gptj_stream.optim.compact import CompactAdamW

REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=201_400_000, help="about a block of GPT-J-6B")
    numel = parser.parse_args().parameters
    layout = Layout((), numel, numel)

    compact, state, gradient = prepared(CompactAdamW(), layout)
    tensors = [*state.values(), gradient]
    read = sum(tensor.nbytes for tensor in tensors)
    written = read - gradient.nbytes
    # What the kernel reads, copied into buffers that were written before; NumPy's copy is the C library's.
    threads = torch.get_num_threads()
    copies = [
        (target.numpy(), source.numpy())
        for tensor in tensors
        for source, target in zip(bytes_of(tensor).chunk(8), bytes_of(torch.ones_like(tensor)).chunk(8), strict=True)
    ]
    pool = ThreadPoolExecutor(threads)

    def copy() -> None:
        list(pool.map(lambda pair: np.copyto(*pair), copies))

    fused, fused_state, fused_gradient = prepared(AdamW(), layout)
    fused_bytes = 2 * sum(tensor.nbytes for tensor in fused_state.values()) + fused_gradient.nbytes
    subjects: dict[str, tuple[Callable[[], None], int]] = {
        "compact AdamW": (compact, read + written),
        "PyTorch's fused AdamW, fp32": (fused, fused_bytes),
        "copy of compact's buffers": (copy, 2 * read),
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    cpu: dict[str, list[float]] = {name: [] for name in subjects}  # of both threads: little changed by other processes
    for repeat in range(REPEATS + 1):  # the first one compiles and touches
        for name, (run, _) in subjects.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)

    copy_times, fused_times = seconds["copy of compact's buffers"], seconds["PyTorch's fused AdamW, fp32"]
    print(f"{numel:,} parameters, {threads} threads, medians of {REPEATS}; ratios are medians too\n")
    print("| | seconds | CPU seconds | bytes a parameter | GB/s | of the copy's GB/s | time to PyTorch's |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, nbytes) in subjects.items():
        times = seconds[name]
        share = median(nbytes / t / (2 * read / c) for t, c in zip(times, copy_times, strict=True))
        ratio = median(t / f for t, f in zip(times, fused_times, strict=True))
        bandwidth = nbytes / median(times) / 1e9
        print(
            f"| {name} | {median(times):.3f} | {median(cpu[name]):.3f} | {nbytes / numel:.2f} | {bandwidth:.1f} "
            f"| {share:.2f} | {ratio:.2f} |"
        )


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)  # NumPy has no bf16


def prepared(optimizer: Optimizer, layout: Layout) -> tuple[Callable[[], None], dict[str, Tensor], Tensor]:
    """A step to run again and again, the state that it changes and the gradient that it reads."""
    state = {name: torch.zeros(part.numel, dtype=part.dtype) for name, part in optimizer.parts(layout).items()}
    optimizer.set_weights(state, torch.randn(layout.numel).mul_(0.02))
    gradient = torch.randn(layout.numel).mul_(1e-3).to(optimizer.gradient_dtype)
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        optimizer.update(0, layout, state, gradient, Update(step, 1e-5, 1.0))

    return run, state, gradient


if __name__ == "__main__":
    main()
