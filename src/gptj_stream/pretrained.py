"""A checkpoint folder, opened for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptj_stream.checkpoint.huggingface import HuggingFaceFolder
from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.machine import free_memory, resolve_device, resolve_dtype
from gptj_stream.model import DocumentAttention, initialize
from gptj_stream.report import Report, gib
from gptj_stream.seeding import derived_seed
from gptj_stream.store import ResidentStore, Store


@dataclass(frozen=True)
class Pretrained:
    """A model to evaluate or to generate with."""

    config: ModelConfig
    tokenizer: Tokenizer
    executor: Executor

    def logits(self, input_ids: list[int] | Tensor) -> Tensor:
        """(N, vocab_size) next-token logits of one document of N token ids.

        Raises:
            UserError: an id outside the vocabulary, or more ids than the model has positions.
        """
        ids = torch.as_tensor(input_ids, dtype=torch.int64)
        self.config.check_ids(ids.tolist())
        return self.executor.logits(ids, torch.arange(len(ids)), lambda _: DocumentAttention((len(ids),)))


def load(
    model: Path | str, *, precision: str = "auto", device: str = "auto", report: Report | None = None
) -> Pretrained:
    """Open a checkpoint folder in Hugging Face layout, or a run folder.

    Args:
        precision: `fp32`, `bf16`, or `auto` for bf16 where the device multiplies it natively.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`.

    Raises:
        UserError: the folder does not hold a whole GPT-J with its tokenizer, or the model does not fit in memory.
    """
    folder = HuggingFaceFolder(Path(model))
    tokenizer = Tokenizer.load(Path(model))
    resolved = resolve_device(device)
    dtype, parameters = resolve_dtype(precision, resolved), folder.config.parameters
    check_memory(f"{parameters:,} parameters are {dtype.itemsize} bytes each", parameters * dtype.itemsize, resolved)
    store = ResidentStore(model_layouts(folder.config), device=resolved, dtype=dtype)
    folder.load(store, report or Report())
    return Pretrained(folder.config, tokenizer, Executor(folder.config, store))


def check_memory(what: str, needed: int, device: torch.device) -> None:
    """Refuse a model before it is allocated.

    Raises:
        UserError: it needs more memory than the device has free.
    """
    free = free_memory(device)
    if needed > free:
        raise UserError(
            f"{what}, {gib(needed)} in all; {gib(free)} are free on {device}; use a smaller model or a larger machine"
        )


def fill_fresh(store: Store, config: ModelConfig, seed: int) -> None:
    """Fresh weights for every layer. A parameter's values follow from the seed and its place, in whatever order."""
    for layer, layout in enumerate(store.layouts):
        flat = torch.empty(layout.numel)
        for index, (slot, view) in enumerate(layout.views(flat)):
            initialize(slot.name, view, config, torch.Generator().manual_seed(derived_seed(seed, layer, index)))
        store.write(layer, {"weight": flat})
