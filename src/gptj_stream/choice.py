"""Which of the ways to run that the options leave open: the first that fits, then the fastest within the limits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.files import set_aside_path
from gptj_stream.machine import free_memory
from gptj_stream.optim import AdamW
from gptj_stream.options import TrainOptions
from gptj_stream.plan import CPU, Kind, Plan, state_name
from gptj_stream.report import Report, gib
from gptj_stream.speed import Speed, measure
from gptj_stream.store.file_home import STORE_FILES

_PROGRAM = 100 << 20
"""What the program itself still grows by: compiled kernels, threads' stacks, what the allocator holds back."""


def fitting_plan(
    options: TrainOptions,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    sequence_length: int,
    saved_dtype: torch.dtype,
) -> Plan:
    """The first way to run, of those that the options leave open, that fits with what there is.

    Args:
        saved_dtype: of the weights that the run leaves.

    Raises:
        UserError: none does; the message says what the smallest one needs.
    """
    limits = _Limits.of(options, device)
    base = Plan(
        config=config,
        device=device,
        dtype=dtype,
        optimizer=_optimizer(options, "fp32"),
        kind="resident",
        sequence_length=sequence_length,
        micro_batch_size=min(options.micro_batch_size, options.global_batch_size),
        global_batch_size=options.global_batch_size,
        folder=store_folder(options),
        output=options.output,
        result_bytes=config.parameters * saved_dtype.itemsize * (2 if options.eval_data else 1),
        program_bytes=0,
        checkpoints=1 + options.save_total_limit,  # a new one is written before the oldest goes
        kept_layers=min(options.kept_layers or 0, config.n_layer),
    )
    ways = list(_ways(base, options))
    program = _resident_bytes() + _PROGRAM  # now that all that an optimizer imports is there
    ways = [replace(way, program_bytes=program) for way in ways]
    plan = next(filter(limits.allow, ways), None)
    if plan is None:
        raise _too_small(ways[-1], limits)
    return plan


def fastest_plan(plan: Plan, options: TrainOptions, report: Report, *, refresh: bool = False) -> tuple[Plan, Speed]:
    """The plan, with its memory used as makes a step fastest on this machine, which is measured first."""
    speed = measure(
        plan.config,
        device=plan.device,
        dtype=plan.dtype,
        lengths=(plan.sequence_length,) * plan.micro_batch_size,
        optimizer=plan.optimizer,
        folder=plan.folder if plan.kind == "file" else None,
        state_device=plan.device if plan.kind == "resident" else CPU,
        refresh=refresh,
        report=report,
    )
    # by now most of what the program grows by is there
    plan = replace(plan, program_bytes=max(plan.program_bytes, _resident_bytes()))
    limits = _Limits.of(options, plan.device)
    activations = _activations(plan) if options.kept_layers is None else [plan]
    ways = [_with_weights_at_hand(each, limits) for each in activations if limits.allow(each)]
    if not ways:  # the program has grown since the plan was made
        raise _too_small(plan, limits)
    # of equally fast ones the first: it takes least memory
    return min(ways, key=lambda way: sum(way.seconds(speed).values())), speed


def _activations(plan: Plan) -> Iterator[Plan]:
    """From none kept to all kept. First each block's narrow ones: a byte of them saves nearly twice the work."""
    n = plan.config.n_layer
    for narrow in range(n):
        yield replace(plan, narrow_layers=narrow)
    for kept in range(n + 1):
        yield replace(plan, kept_layers=kept, narrow_layers=n - kept)


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def store_folder(options: TrainOptions) -> Path:
    """Where a file store is or would be."""
    if options.store in ("auto", "resident", "host", "file"):
        return options.output / "run" / "store"
    return Path(options.store)


def _optimizer(options: TrainOptions, state: str) -> AdamW:
    values: dict[str, Any] = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
        "decay_vectors": options.decay_vectors,
    }
    if state == "fp32":
        return AdamW(**values)
    from gptj_stream.optim.compact import CompactAdamW  # noqa: PLC0415  (numba takes a second, and few need it)

    return CompactAdamW(**values, seed=options.seed)


def _ways(base: Plan, options: TrainOptions) -> Iterator[Plan]:
    """What the options leave open, in the order of preference: fp32 before compact, nearer before farther."""
    kinds: list[Kind]
    if options.store in ("resident", "host", "file"):
        kinds = [options.store]  # type: ignore[list-item]
    elif options.store == "auto":
        kinds = ["resident", "file"] if base.device.type == "cpu" else ["resident", "host", "file"]
    else:
        kinds = ["file"]
    states = ["fp32", "compact"] if options.optimizer_state == "auto" else [options.optimizer_state]
    for kind in kinds:
        for state in states:
            # a file of 16 bytes a parameter is slower than one of 7, and no better for what it is used for
            skipped = kind == "file" and state == "fp32" and len(states) > 1
            on_device = kind == "resident" and base.device.type != "cpu" and state == "compact"
            if on_device and len(states) == 1 and len(kinds) == 1:
                raise UserError(
                    "optimizer_state 'compact' is updated by the CPU: give --store host or file, "
                    "or --optimizer-state fp32"
                )
            if not (skipped or on_device):
                yield replace(base, kind=kind, optimizer=_optimizer(options, state))


@dataclass(frozen=True)
class _Limits:
    memory: int
    device_memory: int
    asked: bool

    @classmethod
    def of(cls, options: TrainOptions, device: torch.device) -> _Limits:
        """What the options allow, as far as it is there; by default all but a tenth of what is free."""
        free = _resident_bytes() + free_memory(CPU)
        memory = min(options.memory or int(0.9 * free), free)
        on_device = 0
        if device.type != "cpu":
            free_there = free_memory(device)
            on_device = min(options.device_memory or int(0.9 * free_there), free_there)
        return cls(memory, on_device, asked=memory == options.memory)

    def allow(self, plan: Plan) -> bool:
        return not self.missing(plan)

    def missing(self, plan: Plan) -> str:
        """What the plan needs more of than there is, and how much; empty if it fits."""
        memory, on_device = sum(plan.memory().values()), sum(plan.device_memory().values())
        if memory > self.memory:
            return f"{gib(memory)} of memory, {gib(self.memory)} {'are allowed' if self.asked else 'are free'}"
        if on_device > self.device_memory:
            return f"{gib(on_device)} of {plan.device}'s memory, {gib(self.device_memory)} are there"
        return self.missing_disk(plan)

    def missing_disk(self, plan: Plan) -> str:
        """The same of disks."""
        uses = plan.disk()
        disks: dict[int, list[str]] = {}
        for what in uses:
            disks.setdefault(_existing(plan.place(what)).stat().st_dev, []).append(what)
        for whats in disks.values():
            needed, place = sum(uses[what] for what in whats), plan.place(whats[0])
            free = shutil.disk_usage(_existing(place)).free + _replaced_bytes(plan)
            if needed > free:
                return f"{gib(needed)} of disk in {place} ({' and '.join(whats)}), {gib(free)} are free"
        return ""


def _existing(path: Path) -> Path:
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def _replaced_bytes(plan: Plan) -> int:
    """Of files that the run takes over or deletes: its own when it is resumed, those of one that it overwrites."""
    before = plan.output.absolute()
    folders = (before / "run", set_aside_path(before) / "run")
    paths = {path for folder in folders if folder.is_dir() for path in folder.rglob("*")}
    paths |= {plan.folder.absolute() / name for name in STORE_FILES}
    return sum(path.stat().st_size for path in paths if path.is_file())


def _with_weights_at_hand(plan: Plan, limits: _Limits) -> Plan:
    """The plan, which fits, with as many layers' weights in memory as fit as well."""
    if plan.kind != "file":
        return plan
    left = limits.memory - sum(plan.memory().values())
    count = 0
    for layer in reversed(plan.parts):
        left -= layer["weight"].nbytes
        if left < 0:
            break
        count += 1
    return replace(plan, in_memory=count)


def _too_small(plan: Plan, limits: _Limits) -> UserError:
    """Name what is missing for the most modest way, and what would work: with smaller steps, or with more memory."""
    missing = limits.missing(plan)
    message = (
        f"training {plan.config.parameters:,} parameters ({plan.kind} store, {state_name(plan.optimizer)} state) needs "
        f"{missing}"
    )
    if missing == limits.missing_disk(plan):  # which no smaller step would mend
        return UserError(f"{message}; make room there, or name folders on a larger disk (--output, --store)")
    smaller = replace(plan, kept_layers=0, narrow_layers=0, micro_batch_size=1)
    while not limits.allow(smaller) and smaller.global_batch_size > 1:
        smaller = replace(smaller, global_batch_size=smaller.global_batch_size // 2)
    steps = f"--micro-batch-size 1 --global-batch-size {smaller.global_batch_size}"
    if plan.kept_layers:
        steps += " --kept-layers 0"
    if limits.allow(smaller):
        return UserError(f"{message}; it fits with {steps}")
    needs = [f"--memory {_size(smaller.memory())}"]
    if smaller.device_memory():
        needs.append(f"--device-memory {_size(smaller.device_memory())}")
    if smaller.kind == "file":
        needs.append(f"{_size(smaller.disk())} of disk")
    return UserError(f"{message}; the least at this --sequence-length is {', '.join(needs)}, with {steps}")


def _size(uses: Mapping[str, int]) -> str:
    """A total as an option takes it, rounded up."""
    return f"{math.ceil(sum(uses.values()) / 2**30 * 10) / 10:.1f}GiB"
