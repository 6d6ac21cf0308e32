"""Gradients that are sums over tokens, in bf16 on a CPU: PyTorch's kernels beside ours, against fp64.

python benchmarks/norm_gradients.py
"""

from __future__ import annotations

import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gptj_stream import token_sums


def main() -> None:
    table = Table("module", "tokens x width", "error: PyTorch", "error: ours", "ms: PyTorch", "ms: ours")
    for tokens, width in ((2048, 256), (8192, 128), (2048, 4096), (8192, 4096)):
        x, grad = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, width).bfloat16()
        exact = nn.LayerNorm(width).double()
        exact(x.double()).backward(grad.double())
        modules = nn.LayerNorm(width).bfloat16(), token_sums.LayerNorm(width).bfloat16()
        add_row(table, "layer norm", (tokens, width), exact, modules, x.requires_grad_(), grad)
    for tokens, width in ((8192, 256), (8192, 4096)):
        ids = (torch.rand(tokens) ** 3 * 4096).long()  # some tokens are frequent, as in text
        grad = torch.randn(tokens, width).bfloat16()
        embedding = nn.Embedding(4096, width).double()
        embedding(ids).backward(grad.double())
        embeddings = nn.Embedding(4096, width).bfloat16(), token_sums.Embedding(4096, width).bfloat16()
        add_row(table, "embedding", (tokens, width), embedding, embeddings, ids, grad)
    Console(width=110).print(table)


def add_row(
    table: Table,
    name: str,
    size: tuple[int, int],
    exact: nn.Module,
    modules: tuple[nn.Module, nn.Module],
    x: Tensor,
    grad: Tensor,
) -> None:
    errors, times = [], []
    for module in modules:
        seconds = []
        for _ in range(9):
            module.zero_grad()
            start = time.perf_counter()
            module(x).backward(grad)
            seconds.append(time.perf_counter() - start)
        got, want = module.get_parameter("weight").grad, exact.get_parameter("weight").grad
        assert got is not None
        assert want is not None
        errors.append(f"{(got.double() - want).norm() / want.norm():.2%}")
        times.append(f"{1e3 * median(seconds):.1f}")
    table.add_row(name, f"{size[0]} x {size[1]}", *errors, *times)


if __name__ == "__main__":
    main()
