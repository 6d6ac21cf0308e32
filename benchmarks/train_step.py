"""A training step beside transformers' GPT-J, in one run, turn by turn.

Both take the same tokens through forward, backward, clipping and AdamW. The peer is transformers' GPTJForCausalLM in
pure bf16 (or fp32) with torch's fused AdamW, with and without gradient checkpointing: what its users run. Ours keeps
fp32 weights and moments beside bf16 arithmetic. The ceiling is a (2048, width) x (width, 4 width) product.

    python benchmarks/train_step.py --width 768 --layers 12 --batch 8 --length 512
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPTJConfig, GPTJForCausalLM

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.machine import gemm_flops, resolve_device
from gptj_stream.optim import AdamW, Update, clip_coefficient
from gptj_stream.pretrained import fill_fresh
from gptj_stream.store import ResidentStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=50400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = ModelConfig(
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.width // arguments.head_size,
        rotary_dim=arguments.head_size // 4,
        vocab_size=arguments.vocab_size,
        n_positions=max(2048, arguments.length),
        bos_token_id=0,
        eos_token_id=0,
    )
    device, dtype = resolve_device("auto"), getattr(torch, arguments.dtype)
    ids = torch.randint(config.vocab_size, (arguments.batch, arguments.length + 1))
    steps = {
        "gptj-stream, activations kept": ours(config, ids, dtype, device, config.n_layer),
        "gptj-stream, recomputed": ours(config, ids, dtype, device, 0),
        "transformers": transformers_step(config, ids, dtype, device, checkpointing=False),
        "transformers, gradient checkpointing": transformers_step(config, ids, dtype, device, checkpointing=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    ceilings = []
    for turn in range(arguments.rounds + 1):
        ceilings.append(gemm_flops(device, dtype, config.n_embd))
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    report(config, arguments, seconds, median(ceilings), device)


def ours(
    config: ModelConfig, ids: torch.Tensor, dtype: torch.dtype, device: torch.device, kept: int
) -> Callable[[], None]:
    store = ResidentStore(model_layouts(config), device=device, dtype=dtype, optimizer=AdamW())
    fill_fresh(store, config, seed=0)
    executor = Executor(config, store, kept_layers=kept)
    batch = MicroBatch(ids[:, :-1].flatten(), ids[:, 1:].flatten(), (ids.shape[1] - 1,) * len(ids))

    def step() -> None:
        executor.gradients([batch], 1)
        store.apply(Update(1, 1e-5, clip_coefficient(store.gradient_norm(), 1.0)))

    return step


def transformers_step(
    config: ModelConfig, ids: torch.Tensor, dtype: torch.dtype, device: torch.device, *, checkpointing: bool
) -> Callable[[], None]:
    model = GPTJForCausalLM(GPTJConfig(**config.to_huggingface() | {"use_cache": False})).to(device, dtype)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = ids[:, :-1].to(device), ids[:, 1:].flatten().to(device)

    def step() -> None:
        logits = model(inputs).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def report(
    config: ModelConfig,
    arguments: argparse.Namespace,
    seconds: dict[str, list[float]],
    ceiling: float,
    device: torch.device,
) -> None:
    tokens = arguments.batch * arguments.length
    flops = config.training_flops(tokens, tokens, (arguments.length + 1) / 2)
    best_peer = min(median(values) for name, values in seconds.items() if name.startswith("transformers"))
    title = (
        f"{arguments.layers} x {arguments.width}, {arguments.batch} x {arguments.length}, {arguments.dtype}, {device}"
    )
    table = Table(
        "step", "seconds: median (min - max)", "tokens/s", "of the GEMM ceiling", "over best peer", title=title
    )
    for name, values in seconds.items():
        middle = median(values)
        table.add_row(
            name,
            f"{middle:.3f} ({min(values):.3f} - {max(values):.3f})",
            f"{tokens / middle:,.0f}",
            f"{flops / middle / ceiling:.0%}",
            f"{best_peer / middle:.2f}x",
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"GEMM ceiling {ceiling / 1e9:,.0f} GFLOP/s, median of {arguments.rounds + 1} timings in this run")


if __name__ == "__main__":
    main()
