"""A checkpoint, opened for use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from gptj_stream.checkpoint.home import CheckpointHome
from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.machine import free_memory, resolve_device, resolve_dtype
from gptj_stream.model import DocumentAttention, initialize
from gptj_stream.options import EvaluateOptions, GenerateOptions
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
    model: Path | str,
    *,
    precision: str = "auto",
    device: str = "auto",
    memory: int | None = None,
    device_memory: int | None = None,
    config_file: Path | None = None,
    tokenizer: Path | None = None,
    report: Report | None = None,
) -> Pretrained:
    """Open a checkpoint in any format that `gptj inspect` knows, or a run folder.

    Args:
        precision: `fp32`, `bf16`, or `auto` for bf16 where the device multiplies it natively.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`.
        memory: most bytes of this process's memory; a model that is larger is read layer by layer, in every pass.
        device_memory: the same of a CUDA device's.
        config_file: as `Checkpoint` takes it.
        tokenizer: folder of the tokenizer, by default the checkpoint's.

    Raises:
        UserError: there is no whole GPT-J with its tokenizer, or not even two layers fit in memory.
    """
    checkpoint = Checkpoint(Path(model), config_file)
    words = Tokenizer.load(tokenizer or checkpoint.folder)
    resolved = resolve_device(device)
    store = _read_only(
        checkpoint, resolved, resolve_dtype(precision, resolved), memory, device_memory, report or Report()
    )
    return Pretrained(checkpoint.config, words, Executor(checkpoint.config, store))


def open_model(options: EvaluateOptions | GenerateOptions, report: Report | None = None) -> Pretrained:
    """The model that a job's options name.

    Raises:
        UserError: as `load`.
    """
    return load(
        options.model,
        precision=options.precision,
        device=options.device,
        memory=options.memory,
        device_memory=options.device_memory,
        tokenizer=options.tokenizer,
        report=report,
    )


_WORKING_BYTES = 1 << 30
"""Left to the passes themselves: activations, logits, a cache of keys and values."""


def _read_only(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    memory: int | None,
    device_memory: int | None,
    report: Report,
) -> Store:
    """The whole model on the device if it fits; else its layers, read from the checkpoint when their turn comes.

    Raises:
        UserError: not even two layers fit.
    """
    layouts = model_layouts(checkpoint.config)
    sizes = [layout.numel * dtype.itemsize for layout in layouts]
    cpu = torch.device("cpu")
    used = psutil.Process().memory_info().rss + _WORKING_BYTES
    free = free_memory(cpu) if memory is None else memory - used
    free_there = free
    if device.type != "cpu":
        free_there = free_memory(device) if device_memory is None else device_memory - _WORKING_BYTES
    if sum(sizes) <= free_there:
        store = ResidentStore(layouts, device=device, dtype=dtype)
        checkpoint.load(store, report)
        return store
    buffers = 2 * max(sizes)
    if buffers > min(free, free_there):
        raise UserError(
            f"{checkpoint.config.parameters:,} parameters are {dtype.itemsize} bytes each, {gib(sum(sizes))} in all; "
            f"even layer by layer they need {gib(buffers)} of memory beside the program's own {gib(used)}, and "
            f"{gib(max(0, min(free, free_there)))} are free; raise --memory or --device-memory, or use a smaller model"
        )
    in_memory: list[int] = []
    for layer, size in enumerate(sizes):
        if buffers + sum(sizes[other] for other in in_memory) + size <= free:
            in_memory.append(layer)
    report.note(
        f"the model does not fit in {device}'s memory: {len(layouts) - len(in_memory)} of {len(layouts)} layers "
        "are read from the checkpoint in every pass"
    )
    home = CheckpointHome(checkpoint, layouts, dtype=dtype, in_memory=in_memory, pinned=device.type != "cpu")
    return Store(layouts, home, device=device, dtype=dtype)


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
        store.load(layer, flat)
