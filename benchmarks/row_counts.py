"""What a new number of rows costs a bf16 kernel on a CPU, against one it has seen: why rows are rounded up.

python benchmarks/row_counts.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

COUNTS = range(20, 420)


def main() -> None:
    weight = torch.randn(1024, 256).bfloat16()

    def product(rows: int) -> None:
        F.linear(torch.randn(rows, 256).bfloat16(), weight)

    def attention(rows: int) -> None:
        q = torch.randn(1, 4, rows, 64).bfloat16().requires_grad_()
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    table = Table("kernel", f"{len(COUNTS)} row counts: ms each", "one row count: ms each", "memory a new count")
    for name, kernel in (("(rows, 256) x (256, 1024)", product), ("attention, 4 heads of 64, and backward", attention)):
        kernel(COUNTS[-1])
        before = psutil.Process().memory_info().rss
        new = milliseconds(kernel, list(COUNTS))
        grown = psutil.Process().memory_info().rss - before
        same = milliseconds(kernel, [256] * len(COUNTS))
        table.add_row(name, f"{new:.2f}", f"{same:.2f}", f"{grown / len(COUNTS) / 1e6:.1f} MB")
    Console(width=110).print(table)


def milliseconds(kernel: Callable[[int], None], counts: list[int]) -> float:
    start = time.perf_counter()
    for rows in counts:
        kernel(rows)
    return 1e3 * (time.perf_counter() - start) / len(counts)


if __name__ == "__main__":
    main()
