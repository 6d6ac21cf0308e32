"""What a training run will need, before it starts: where everything lives, memory, disk, bytes moved, seconds a step.

The figures follow from shapes and from what this machine was measured to do (`speed`). Documents are taken to be as
long as a sequence, and every position to carry loss: the most that a step can cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from gptj_stream.batch import ROW_MULTIPLE
from gptj_stream.config import ModelConfig
from gptj_stream.executor import block_activation_bytes, model_layouts
from gptj_stream.layout import Layout
from gptj_stream.optim import AdamW, Part
from gptj_stream.report import gib
from gptj_stream.speed import Speed
from gptj_stream.store import state_parts
from gptj_stream.store.file_home import buffer_bytes, file_bytes

Kind = Literal["resident", "host", "file"]
CPU = torch.device("cpu")

_ALLOCATED = 1.03
"""Kept tensors with the small ones beside them (statistics of norm and softmax) and the allocator's rounding."""

_LOSS_CHUNKS = 3 << 26
"""A chunk's logits in the passes' dtype and in fp32, and its gradient (loss.CHUNK_BYTES each at the most)."""


@dataclass(frozen=True)
class Plan:
    """One way to run, and what it takes.

    Attributes:
        kind: where weights, gradients and optimizer state live.
        checkpoints: how many resumable ones are there at the most, where the store is not one itself.
        kept_layers: how many blocks keep their activations.
        narrow_layers: how many keep them but for the feed-forward's inner ones.
        in_memory: of how many layers a file store keeps the weights in memory as well.
        folder: the file store's.
        output: the run folder.
        program_bytes: of memory that the program takes before it opens the model.
        result_bytes: of the weights that the run leaves there, the best and the last where it evaluates.
    """

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    optimizer: AdamW
    kind: Kind
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    folder: Path
    output: Path
    result_bytes: int
    program_bytes: int
    checkpoints: int = 2
    kept_layers: int = 0
    narrow_layers: int = 0
    in_memory: int = 0

    @cached_property
    def layouts(self) -> list[Layout]:
        return model_layouts(self.config)

    @cached_property
    def parts(self) -> list[dict[str, Part]]:
        return state_parts(self.layouts, self.dtype, self.optimizer)

    @property
    def crosses(self) -> bool:
        """Whether weights travel between two memories."""
        return self.device.type != "cpu" and self.kind != "resident"

    @property
    def micro_batches(self) -> int:
        return -(-self.global_batch_size // self.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch_size * self.sequence_length

    @property
    def rows(self) -> int:
        """Of a micro-batch, as the kernels get it: its tokens and filler."""
        return -(-self.micro_batch_size * self.sequence_length // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def forgetful_layers(self) -> int:
        """How many blocks are computed again as a whole."""
        return self.config.n_layer - self.kept_layers - self.narrow_layers

    @property
    def layers_in_memory(self) -> range:
        """The last ones: the backward pass begins with those that the forward pass ends with."""
        return range(len(self.layouts) - self.in_memory, len(self.layouts))

    @cached_property
    def state_bytes(self) -> int:
        return sum(part.nbytes for layer in self.parts for part in layer.values())

    @cached_property
    def gradient_bytes(self) -> int:
        return self.config.parameters * self.optimizer.gradient_dtype.itemsize

    @cached_property
    def weight_bytes(self) -> int:
        """What a pass streams."""
        return sum(layer["weight"].nbytes for layer in self.parts)

    @cached_property
    def cached_bytes(self) -> int:
        """Weights that a file store need not read."""
        return sum(self.parts[layer]["weight"].nbytes for layer in self.layers_in_memory)

    def memory(self) -> dict[str, int]:
        """The most CPU memory, by what holds it."""
        uses = {"program": self.program_bytes}
        if self.kind == "file":
            uses["buffers of the store"] = buffer_bytes(self.parts, self.optimizer.gradient_dtype)
            uses["weights kept at hand"] = self.cached_bytes
        elif self.kind == "host" or self.device.type == "cpu":
            uses["weights and optimizer state"] = self.state_bytes
            uses["gradients"] = self.gradient_bytes
        if self.device.type == "cpu":
            uses |= self._computing()
        return {what: nbytes for what, nbytes in uses.items() if nbytes}

    def device_memory(self) -> dict[str, int]:
        """The most memory of a CUDA device, by what holds it; nothing on a CPU."""
        if self.device.type == "cpu":
            return {}
        uses = {}
        if self.kind == "resident":
            uses = {"weights and optimizer state": self.state_bytes, "gradients": self.gradient_bytes}
        return uses | self._computing()

    def disk(self) -> dict[str, int]:
        """Space that the run takes on disks, by what for."""
        if self.kind == "file":
            return {"store": file_bytes(self.parts, self.optimizer.gradient_dtype), "result": self.result_bytes}
        return {"checkpoints": self.checkpoints * self.state_bytes, "result": self.result_bytes}

    def place(self, what: str) -> Path:
        """The folder of one of `disk`'s uses."""
        return self.folder if what == "store" else self.output

    def moved(self) -> dict[str, int]:
        """Bytes that travel in a step, by between what."""
        moved = {}
        if self.kind == "file":
            # the update's pass over the state, with the gradients; the backward pass's over the weights
            moved["disk read"] = self.state_bytes + self.gradient_bytes + self.weight_bytes - 2 * self.cached_bytes
            moved["disk written"] = self.state_bytes + self.gradient_bytes
        if self.crosses:
            moved["to the device"] = 2 * self.config.parameters * self.dtype.itemsize
            moved["from the device"] = self.gradient_bytes
        return moved

    def seconds(self, speed: Speed) -> dict[str, float]:
        """Of a step, by what they are spent on; `waiting` is what transfers take longer than what they hide behind."""
        config, forgetful = self.config, self.forgetful_layers
        forward = forgetful * speed.block_forward + (config.n_layer - forgetful) * speed.block_forward_kept
        backward = config.n_layer * speed.block_backward + speed.head
        inner = 2 * self.rows * config.n_embd * config.inner_dim / speed.gemm
        again = forgetful * speed.block_forward_kept + self.narrow_layers * inner
        forward, backward, again = (self.micro_batches * each for each in (forward, backward, again))
        embed = self.micro_batches * speed.embed
        update = self.config.parameters * speed.update
        # a gradient is read for its norm, and read and written once more when it is rounded
        gradients = self.config.parameters * (4 + 4 + self.optimizer.gradient_dtype.itemsize) / speed.copy
        casts = 0.0
        if not self.crosses and self.parts[0]["weight"].dtype != self.dtype:
            casts = 2 * self.config.parameters * (4 + self.dtype.itemsize) / speed.copy
        device = {"forward": forward, "backward": backward + embed, "computing again": again}
        host = {"update": update, "gradients": gradients, "casts": casts}
        waiting = 0.0
        if self.device.type == "cpu":  # one after the other, the disk beside
            there, back = forward + update, backward + embed + again + gradients
            waiting = max(0.0, self._disk(speed, forward=True) - there) + max(
                0.0, self._disk(speed, forward=False) - back
            )
        elif self.crosses:  # the update is made on the way to the device
            assert speed.bus
            there = update + self._disk(speed, forward=True) + self.weight_bytes / speed.bus
            back = self._disk(speed, forward=False) + (self.weight_bytes + self.gradient_bytes) / speed.bus
            waiting = max(0.0, there - forward) + max(0.0, back - backward - embed - again)
            host = {}
        return {what: value for what, value in {**device, **host, "waiting": waiting}.items() if value}

    def bound(self, speed: Speed) -> str:
        """What decides the time of a step."""
        seconds = self.seconds(speed)
        if seconds.get("waiting", 0.0) > 0.05 * sum(seconds.values()):
            if self.kind == "file":
                return "disk"
            return "bus" if self.config.parameters * speed.update < self.weight_bytes / (speed.bus or 1) else "update"
        return "update" if seconds.get("update", 0.0) > 0.5 * sum(seconds.values()) else "compute"

    def _disk(self, speed: Speed, *, forward: bool) -> float:
        """Seconds that the disk needs in one of the passes."""
        if self.kind != "file":
            return 0.0
        assert speed.disk_read
        assert speed.disk_write
        if forward:
            read, written = self.state_bytes + self.gradient_bytes - self.cached_bytes, self.state_bytes
        else:
            read, written = self.weight_bytes - self.cached_bytes, self.gradient_bytes
        return read / speed.disk_read + written / speed.disk_write

    def _computing(self) -> dict[str, int]:
        """Memory of the device that computes, whatever the store."""
        config, size = self.config, self.dtype.itemsize
        largest = max(layout.numel for layout in self.layouts)
        uses = {"gradient being summed": 4 * largest}
        if self.crosses:
            uses["weights and a gradient on their way"] = (2 * size + self.optimizer.gradient_dtype.itemsize) * largest
        elif self.parts[0]["weight"].dtype != self.dtype:
            uses["weights cast"] = size * largest
        rows = self.micro_batches * self.rows
        uses["inputs of every layer"] = (config.n_layer + 2) * rows * config.n_embd * size
        kept = self.kept_layers * block_activation_bytes(config, rows, self.dtype)
        narrow = self.narrow_layers * block_activation_bytes(config, rows, self.dtype, inner=False)
        uses["kept activations"] = int(_ALLOCATED * (kept + narrow))
        uses["one layer's work"] = self._working()
        return uses

    def _working(self) -> int:
        """What the passes of one layer and micro-batch hold at the most, and give back."""
        config, size = self.config, self.dtype.itemsize
        tokens = self.rows
        # Matrix kernels pack a weight into a layout of their own: a block's largest whole, the vocabulary's by halves
        # (measured). The vocabulary's gradient is summed in fp32, then rounded.
        vocabulary = config.vocab_size * config.n_embd * (4 + 3 * size // 2) + 4 * tokens * config.n_embd * size
        recorded = 0
        if self.forgetful_layers:
            recorded = block_activation_bytes(config, tokens, self.dtype)
        elif self.narrow_layers:
            recorded = tokens * config.inner_dim * size
        wide = tokens * size * (2 * config.inner_dim + 5 * config.n_embd)
        if config.attn_pdrop:  # scores, weights, mask, product, and their gradients, of every head and pair of tokens
            wide += 6 * size * tokens * self.sequence_length * config.n_head
        packed = config.inner_dim * config.n_embd * size
        return max(vocabulary + _LOSS_CHUNKS, recorded + wide + packed + config.block_parameters * size)


def state_name(optimizer: AdamW) -> str:
    return "fp32" if type(optimizer) is AdamW else "compact"


def described(plan: Plan, speed: Speed) -> str:
    """The plan as a table, a line a figure."""
    config = plan.config
    seconds = plan.seconds(speed)
    total = sum(seconds.values())
    where = {"resident": f"in {plan.device}'s memory", "host": "in CPU memory", "file": f"in {plan.folder}"}[plan.kind]
    flops = config.training_flops(plan.tokens, plan.tokens, (plan.sequence_length + 1) / 2)
    rows = [
        ("model", f"{config.parameters:,} parameters, {config.n_layer} blocks of {config.n_embd}"),
        (
            "step",
            f"{plan.tokens:,} tokens: {plan.global_batch_size} sequences of {plan.sequence_length}, "
            f"{plan.micro_batch_size} at a time",
        ),
        ("state", f"{state_name(plan.optimizer)}: {gib(plan.state_bytes)}; gradients: {gib(plan.gradient_bytes)}"),
        ("store", f"{plan.kind}, {where}" + f", weights of {plan.in_memory} layers at hand" * (plan.kind == "file")),
        (
            "activations",
            f"of {plan.kept_layers} blocks kept, of {plan.narrow_layers} but for the feed-forward's, "
            f"of {plan.forgetful_layers} computed again",
        ),
        *_broken_down("memory, at most", plan.memory()),
        *_broken_down(f"memory of {plan.device}", plan.device_memory()),
        *_broken_down("disk", plan.disk() if plan.kind == "file" else {}),
        *_broken_down("moved a step", plan.moved()),
        ("time a step", f"{total:.3g} s"),
        *(("", f"{value / total:8.0%}  {what}") for what, value in seconds.items() if value > 0.005 * total),
        ("speed", f"{plan.tokens / total:,.0f} tokens/s, bound by {plan.bound(speed)}"),
        ("", f"{flops / total / speed.gemm:8.0%}  of matrix products' {speed.gemm / 1e9:,.0f} GFLOP/s"),
    ]
    return "\n".join(f"  {what:<16} {value}" for what, value in rows)


def _broken_down(what: str, uses: Mapping[str, int]) -> list[tuple[str, str]]:
    """A total and what it is made of, without what is too small to show."""
    if not uses:
        return []
    shown = {name: nbytes for name, nbytes in uses.items() if nbytes > 0.05 * 2**30}
    return [(what, gib(sum(uses.values()))), *(("", f"{gib(nbytes):>8}  {name}") for name, nbytes in shown.items())]
