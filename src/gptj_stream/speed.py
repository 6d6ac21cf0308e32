"""What this machine is measured to do, in about a minute, and remembered for a week.

The model's own layers are timed at their real width and number of tokens, since no ceiling predicts them: two blocks
and a small vocabulary, then no block and the real one, are run by the executor from a store that looks at the clock.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Annotated

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from gptj_stream.batch import MicroBatch
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor, model_layouts
from gptj_stream.files import write_text
from gptj_stream.layout import Layout, Slot
from gptj_stream.machine import gemm_flops
from gptj_stream.optim import Optimizer, Update
from gptj_stream.report import Report
from gptj_stream.store import ResidentStore
from gptj_stream.store.direct_io import DirectFile, aligned_buffer

KEEP_SECONDS = 7 * 24 * 3600
"""After this a measurement is made again."""

_COPY_BYTES = 1 << 27  # beyond any cache
_UPDATE_ROWS = 1 << 12  # of a square matrix: 16 M parameters
_DISK_BYTES = 1 << 30
_DISK_SECONDS = 4.0  # a slow disk shows its speed in less than `_DISK_BYTES`


@dataclass(frozen=True)
class Speed:
    """Seconds are those of one micro-batch through one layer; several micro-batches take that many times as long.

    Attributes:
        gemm: FLOP/s of a matrix product of the model's width.
        copy: bytes/s of copying CPU memory, those read and those written together.
        update: seconds a parameter of the optimizer's update.
        block_forward: seconds of a block whose activations are not kept.
        block_forward_kept: seconds of a block whose graph is recorded.
        block_backward: seconds of differentiating a recorded block and adding its gradient up in fp32.
        head: seconds of final norm, projection and loss, forward and backward; every position is a target.
        embed: seconds of the embedding, forward and backward.
        disk_read: bytes/s of direct I/O; None where no folder was given. So is `disk_write`.
        bus: bytes/s between pinned CPU memory and CUDA, there and back in turn; None on a CPU.
    """

    gemm: float
    copy: float
    update: float
    block_forward: float
    block_forward_kept: float
    block_backward: float
    head: float
    embed: float
    disk_read: float | None = None
    disk_write: float | None = None
    bus: float | None = None


@dataclass(frozen=True)
class _Part:
    """Fields of `Speed` that are measured together.

    Attributes:
        depends_on: all that decides what `measure` finds.
    """

    name: str
    fields: tuple[str, ...]
    depends_on: tuple[object, ...]
    measure: Callable[[], Sequence[float]]

    @property
    def key(self) -> str:
        return " | ".join(map(str, (self.name, *self.depends_on)))


class _Entry(BaseModel):
    """A part as the cache keeps it: when it was measured (seconds since 1970), and the fields' values."""

    measured: float
    values: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def default_cache() -> Path:
    """`gptj-stream/speed.json` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptj-stream" / "speed.json"


def measure(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lengths: Sequence[int],
    optimizer: Optimizer,
    folder: Path | None = None,
    state_device: torch.device | None = None,
    cache: Path | None = None,
    refresh: bool = False,
    report: Report | None = None,
) -> Speed:
    """What is remembered of this machine; what is not is measured, and remembered.

    Args:
        lengths: of the documents of one micro-batch.
        folder: on the disk to be measured; need not be there yet.
        state_device: where the optimizer's state is when it is updated; `device` by default.
        cache: the file to remember in, `default_cache()` by default. One that is damaged or cannot be written costs
            the time to measure again, no more.
        refresh: measure all of it again.

    Raises:
        UserError: `folder` cannot be written, or its disk is full.
    """
    cache, report = cache or default_cache(), report or Report()
    parts = _parts(config, device, dtype, tuple(lengths), optimizer, folder, state_device or device)
    known = {} if refresh else _recall(cache)
    # an entry with other fields is not one of ours
    missing = [part for part in parts if part.key not in known or known[part.key].values.keys() != set(part.fields)]
    if missing:
        with report.bar("measure this machine", len(missing)) as advance:
            for done, part in enumerate(missing):
                advance(done, part.name)
                values = dict(zip(part.fields, part.measure(), strict=True))
                known[part.key] = _Entry(measured=time.time(), values=values)
                _remember(cache, part.key, known[part.key])
            advance(len(missing), "")
    return Speed(**{field: value for part in parts for field, value in known[part.key].values.items()})


def _parts(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    optimizer: Optimizer,
    folder: Path | None,
    state_device: torch.device,
) -> list[_Part]:
    computing = (*_machine(device), dtype)
    documents = "+".join(f"{count}x{length}" for length, count in sorted(Counter(lengths).items()))
    dropout = f"dropout {config.embd_pdrop}/{config.resid_pdrop}/{config.attn_pdrop}"
    width = f"width {config.n_embd}"
    block = (width, f"inner {config.inner_dim}", f"{config.n_head} heads", f"rotary {config.rotary_dim}")
    state = {name: part.dtype for name, part in optimizer.parts(_matrix(_UPDATE_ROWS)).items()}
    parts = [
        _Part("memory", ("copy",), _machine(torch.device("cpu")), _copy),
        _Part(
            "optimizer",
            ("update",),
            (*_machine(state_device), type(optimizer).__qualname__, optimizer.gradient_dtype, state),
            lambda: _update(optimizer, state_device),
        ),
        _Part(
            "block",  # with the matrix product, in the same minute: a shared machine's speed drifts
            ("gemm", "block_forward", "block_forward_kept", "block_backward"),
            (*computing, *block, documents, dropout),
            lambda: _block(config, device, dtype, lengths),
        ),
        _Part(
            "embedding and head",
            ("embed", "head"),
            (*computing, width, f"vocabulary {config.vocab_size}", documents, dropout),
            lambda: _ends(config, device, dtype, lengths),
        ),
    ]
    if folder:
        there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
        parts.append(
            _Part("disk", ("disk_read", "disk_write"), (f"device {there.stat().st_dev}",), lambda: _disk(there))
        )
    if device.type == "cuda":
        parts.append(_Part("bus", ("bus",), _machine(device), lambda: _bus(device)))
    return parts


def _machine(device: torch.device) -> tuple[object, ...]:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), f"torch {torch.__version__}"
    return _processor(), f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _recall(cache: Path) -> dict[str, _Entry]:
    """The entries that are not too old; none if the file is not there or not sound."""
    try:
        entries = _ENTRIES.validate_json(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    now = time.time()
    return {key: entry for key, entry in entries.items() if 0 <= now - entry.measured < KEEP_SECONDS}


def _remember(cache: Path, key: str, entry: _Entry) -> None:
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        # read again: another process may have measured other things meanwhile
        write_text(cache, _ENTRIES.dump_json(_recall(cache) | {key: entry}, indent=1).decode())


def _repeated(run: Callable[[], Sequence[float]], seconds: float = 1.0) -> list[float]:
    """The lower median of each number that `run` returns, of 2 to 9 calls, of which no more begin after `seconds`.

    The first call compiles kernels, and any call may be held up by other processes: of two, the faster one counts.
    """
    started = time.perf_counter()
    rows = [run(), run()]
    while len(rows) < 9 and time.perf_counter() - started < seconds:
        rows.append(run())
    return [median_low(column) for column in zip(*rows, strict=True)]


class _Stopwatch(ResidentStore):
    """Random weights of one model, and how long each layer that it lends is used."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, turns: int) -> None:
        """End the backward pass after `turns` layers of both passes."""
        super().__init__(model_layouts(config), device=device, dtype=dtype)
        self._left = self._turns_in_all = turns
        self._seconds: list[float] = []
        # random, since GPUs multiply zeros faster; one piece over and over, since drawing 200 M numbers takes seconds
        piece = torch.randn(1 << 20, device=device).mul_(0.02).to(dtype)
        for layer, layout in enumerate(self.layouts):
            self.load(layer, piece.repeat(-(-layout.numel // len(piece)))[: layout.numel])

    def turns(self) -> list[float]:
        """Seconds of each turn since the last call."""
        seconds, self._seconds = self._seconds, []
        self._left = self._turns_in_all
        return seconds

    def stream(self, order: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        for layer, weights in super().stream(order):
            started = self._now()
            yield layer, weights
            self._seconds.append(self._now() - started)
            self._left -= 1
            if not self._left:
                return

    def put_gradient(self, layer: int, gradient: Tensor) -> None:
        """What becomes of a gradient depends on the store, and is not a part of the layer's time."""

    def _now(self) -> float:
        _wait(self.device)
        return time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _block(config: ModelConfig, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> Sequence[float]:
    """Two blocks, of which the second is kept. The backward pass ends before the first, which would tell no more."""
    two = config.model_copy(update={"n_layer": 2, "vocab_size": 64})
    _, forward, forward_kept, _, backward = _turns(two, device, dtype, lengths, turns=5, seconds=12.0)
    return gemm_flops(device, dtype, config.n_embd), forward, forward_kept, backward


def _ends(config: ModelConfig, device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> Sequence[float]:
    without_blocks = config.model_copy(update={"n_layer": 0})
    embed_forward, head, embed_backward = _turns(without_blocks, device, dtype, lengths, turns=3, seconds=6.0)
    return embed_forward + embed_backward, head


def _turns(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    *,
    turns: int,
    seconds: float,
) -> list[float]:
    """Seconds of each layer's turn in the forward and the backward pass; of the blocks, the last is kept."""
    ids = torch.randint(config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids, ids, lengths)
    with closing(_Stopwatch(config, device, dtype, turns)) as watch:
        executor = Executor(config, watch, kept_layers=min(1, config.n_layer))

        def step() -> list[float]:
            executor.gradients([batch], 1)
            return watch.turns()

        return _repeated(step, seconds)


def _copy() -> list[float]:
    source, target = torch.zeros(2, _COPY_BYTES, dtype=torch.uint8).fill_(1)

    def run() -> list[float]:
        started = time.perf_counter()
        target.copy_(source)
        return [time.perf_counter() - started]

    return [2 * _COPY_BYTES / seconds for seconds in _repeated(run)]


def _bus(device: torch.device) -> list[float]:
    here = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = here.to(device)

    def run() -> list[float]:
        _wait(device)
        started = time.perf_counter()
        there.copy_(here, non_blocking=True)
        here.copy_(there, non_blocking=True)
        _wait(device)
        return [time.perf_counter() - started]

    return [2 * _COPY_BYTES / seconds for seconds in _repeated(run)]


def _matrix(rows: int) -> Layout:
    return Layout((Slot("matrix.weight", "weight", (rows, rows), 0),), rows * rows, rows * rows)


def _update(optimizer: Optimizer, device: torch.device) -> list[float]:
    layout = _matrix(_UPDATE_ROWS)
    state = {
        name: torch.zeros(part.numel, dtype=part.dtype, device=device) for name, part in optimizer.parts(layout).items()
    }
    optimizer.set_weights(state, torch.randn(layout.numel, device=device))
    gradient = torch.randn(layout.numel, device=device).to(optimizer.gradient_dtype)
    step = 0

    def run() -> list[float]:
        nonlocal step
        step += 1
        _wait(device)
        started = time.perf_counter()
        optimizer.update(0, layout, state, gradient, Update(step, learning_rate=1e-5, gradient_scale=0.9))
        _wait(device)
        return [time.perf_counter() - started]

    return [seconds / layout.numel for seconds in _repeated(run)]


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes/s read and written in a file that is there already, as a store's files are after the first step."""
    try:
        chunk = 1 << 20
        nbytes = min(_DISK_BYTES, shutil.disk_usage(folder).free // 10) // chunk * chunk
        if nbytes < 4 * chunk:
            raise UserError(
                f"{folder}: the disk has less than {40 * chunk / 2**20:.0f} MiB free; make room or use another"
            )
        buffer = aligned_buffer(min(nbytes // 4, 1 << 27))
        buffer.random_()  # some disks keep zeros without writing them
        descriptor, name = tempfile.mkstemp(prefix=".gptj-speed-", dir=folder)
        os.close(descriptor)
        try:
            with closing(DirectFile(Path(name), nbytes, new=True)) as file:
                offsets = range(0, nbytes - len(buffer) + 1, len(buffer))
                new, _ = _timed(file, file.write, offsets, buffer)  # the first writing also claims the space
                written, write_seconds = _timed(file, file.write, offsets[:new], buffer)
                if not file.direct:
                    _forget_pages(Path(name))
                read, read_seconds = _timed(file, file.read, offsets[:written], buffer)
        finally:
            Path(name).unlink()
    except OSError as error:
        raise UserError(f"{folder}: the speed of its disk cannot be measured: {error}") from None
    return read * len(buffer) / read_seconds, written * len(buffer) / write_seconds


def _timed(
    file: DirectFile, transfer: Callable[[int, Tensor], None], offsets: Sequence[int], buffer: Tensor
) -> tuple[int, float]:
    """Transfer `buffer` from or to the first offsets, as many as there is time for: how many, and the seconds."""
    started = time.perf_counter()
    done = 0
    while done < len(offsets) and time.perf_counter() - started < _DISK_SECONDS:
        transfer(offsets[done], buffer)
        done += 1
    file.sync()
    return done, time.perf_counter() - started


def _forget_pages(path: Path) -> None:
    """Drop a synced file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
