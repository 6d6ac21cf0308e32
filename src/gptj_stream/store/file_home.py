"""Layers in files on a fast disk, read and written past the page cache; the weights of some also in memory.

FOLDER/state.bin      every layer's state (state_file.py)
FOLDER/gradients.bin  a place for each layer's gradient
FOLDER/store.json     whose it is, and the last committed update

A gradient is replaced only in a backward pass that begins after every layer was updated. So after a crash each layer is
of the last committed step, or of the one before and has its gradient and the update that is still to be made of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from gptj_stream.errors import UserError
from gptj_stream.files import read_json, write_text
from gptj_stream.optim import Update
from gptj_stream.store.direct_io import DirectFile, aligned, aligned_buffer
from gptj_stream.store.home import Parts
from gptj_stream.store.state_file import StateFile, record_bytes, state_file_bytes
from gptj_stream.trace import Trace

STATES, GRADIENTS, MANIFEST = STORE_FILES = ("state.bin", "gradients.bin", "store.json")
FORMAT = 1
LENT = 2
"""Layers away from home at a time: one computes, the next is fetched."""


def file_bytes(parts: Sequence[Parts], gradient_dtype: torch.dtype) -> int:
    """Disk space of a whole store."""
    return state_file_bytes(parts) + sum(_gradient_bytes(layer, gradient_dtype) for layer in parts)


def buffer_bytes(parts: Sequence[Parts], gradient_dtype: torch.dtype) -> int:
    """Memory that an open store takes beside the weights it keeps there."""
    return LENT * (max(map(record_bytes, parts)) + max(_gradient_bytes(layer, gradient_dtype) for layer in parts))


def _gradient_bytes(parts: Parts, dtype: torch.dtype) -> int:
    return aligned(parts["weight"].numel * dtype.itemsize)


@dataclass(frozen=True)
class Owner:
    """What tells a store from another's.

    Attributes:
        run: a name that no other run has.
        replaces: the run that this one overwrites, whose store it may take.
        folder: where the run was when it began, for messages.
    """

    run: str
    model: str
    optimizer_state: str
    folder: str
    replaces: str | None = None


class _Manifest(BaseModel):
    """`store.json`. Until the weights are imported, `complete` is false, and what is there counts for nothing."""

    model_config = ConfigDict(extra="forbid")

    format: int
    owner: Owner
    complete: bool = False
    update: Update | None = None
    layers: list[int] = []
    note: dict[str, Any] = {}

    @classmethod
    def read(cls, folder: Path, owner: Owner) -> _Manifest | None:
        """Of the owner's store in `folder`; None where there is none.

        Raises:
            UserError: other files, another's store, or a damaged one.
        """
        path = folder / MANIFEST
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(f"{folder} holds files that are not a store's; give --store an empty or a new folder")
            return None
        values = read_json(path)
        if values.get("format") != FORMAT:
            raise UserError(f"{folder}: a store of format {values.get('format')!r}; this version reads format {FORMAT}")
        try:
            manifest = cls(**values)
        except ValidationError as error:
            what = error.errors()[0]
            where = ".".join(map(str, what["loc"]))
            raise UserError(f"{path}: damaged ({where}: {what['msg']}); the store cannot be used") from None
        there = manifest.owner
        if owner.replaces == there.run:
            return None
        differing = [
            f"{name} {old}, here {new}"
            for name, old, new in (
                ("run", there.folder, owner.folder),
                ("model", there.model, owner.model),
                ("optimizer_state", there.optimizer_state, owner.optimizer_state),
            )
            if old != new and not (name == "run" and there.run == owner.run)  # a run may be moved
        ]
        if there.run != owner.run or differing:
            raise UserError(
                f"{folder} holds the store of another run ({'; '.join(differing)}); use another --store, or remove it "
                "if that run is not needed"
            )
        return manifest


def check_place(folder: Path, owner: Owner) -> None:
    """Refuse a folder that cannot become, or go on as, the owner's store. Nothing is written.

    Raises:
        UserError: it is another's, or cannot be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "it is read-only" if there.is_dir() else f"{there} is a file"
        raise UserError(f"{folder}: a store cannot be made there, {what}; use another --store")
    _Manifest.read(folder, owner)


class FileHome:
    """See the module.

    Attributes:
        complete: whether the folder was a store already when it was opened.
        note: what the last commit left for whoever opens the folder again.
        direct: whether the file system takes direct I/O.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Parts],
        *,
        gradient_dtype: torch.dtype,
        owner: Owner,
        in_memory: Collection[int] = (),
        pinned: bool = False,
        trace: Trace | None = None,
    ) -> None:
        """Open the store in `folder`, or make one of zeros, which is a store from the first `annotate` or `commit` on.

        Args:
            in_memory: layers whose weights are kept in memory as well.
            pinned: lock buffers for copies to and from CUDA.

        Raises:
            UserError: it is in use, holds something else, or is damaged.
            OSError: it cannot be written, or the disk is too full.
        """
        self._folder, self._parts, self._gradient_dtype = folder, parts, gradient_dtype
        self._trace = trace or Trace()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        there = _Manifest.read(folder, owner)
        self.complete = there is not None and there.complete
        self._manifest = there if there and there.complete else _Manifest(format=FORMAT, owner=owner)
        if not self.complete:
            self._keep_manifest()
        if not all(0 <= layer < len(parts) for layer in self._manifest.layers):
            raise UserError(f"{folder / 'store.json'}: damaged (layers); the store cannot be used")
        self._states = StateFile(folder / STATES, parts, new=not self.complete)
        sizes = [_gradient_bytes(layer, gradient_dtype) for layer in parts]
        self._gradient_places = [sum(sizes[:layer]) for layer in range(len(parts))]
        self._gradients = DirectFile(folder / GRADIENTS, sum(sizes), new=not self.complete)
        self.direct = self._states.direct

        self._writer = ThreadPoolExecutor(1, "write")
        self._failure: BaseException | None = None  # of a write; nothing is written after it
        self._written: dict[int, Future[None]] = {}  # the last write of each layer's state
        self._gradient_written: dict[int, Future[None]] = {}
        self._records: SimpleQueue[Tensor] = SimpleQueue()
        self._gradient_buffers: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(LENT):
            self._records.put(aligned_buffer(max(map(record_bytes, parts)), pinned=pinned))
            self._gradient_buffers.put(aligned_buffer(max(sizes), pinned=pinned))
        self._lent: dict[int, Tensor | None] = {}  # a layer's record buffer; None where its weights alone are in memory
        self._gradient_lent: dict[int, Tensor] = {}
        self._in_memory: dict[int, Tensor] = {}
        for layer in in_memory:
            self._in_memory[layer] = aligned_buffer(parts[layer]["weight"].nbytes, pinned=pinned)
            if self.complete:
                self._states.read(layer, 0, self._in_memory[layer])

    @property
    def note(self) -> dict[str, Any]:
        return self._manifest.note

    def fetch(self, layer: int, *, whole: bool) -> dict[str, Tensor]:
        if layer in self._written:
            self._written[layer].result()
        if not whole and layer in self._in_memory:
            self._lent[layer] = None
            return {"weight": self._tensor(layer, "weight", self._in_memory[layer])}
        record = self._lent[layer] = self._records.get()
        names = list(self._parts[layer]) if whole else ["weight"]
        start = len(self._in_memory[layer]) if layer in self._in_memory else 0  # the weight comes first
        end = sum(aligned(self._parts[layer][name].nbytes) for name in names)
        self._states.read(layer, start, record[start:end])
        return self._views(layer, record, names)

    def keep(self, layer: int, step: int | None = None) -> None:
        record = self._lent[layer]
        assert record is not None, "a state that is kept was lent whole"
        step = self._states.steps[layer] if step is None else step
        end = record_bytes(self._parts[layer])
        pieces = [record[:end]]
        if layer in self._in_memory:
            pieces = [self._in_memory[layer], record[len(self._in_memory[layer]) : end]]
        self._written[layer] = self._write("layer", layer, lambda: self._states.write(layer, step, pieces))

    def release(self, layer: int) -> None:
        record = self._lent.pop(layer)
        if record is not None:
            self._after_write(self._written.get(layer), lambda: self._records.put(record))

    def gradient(self, layer: int) -> Tensor:
        if self._failure:
            raise self._failure
        buffer = self._gradient_lent[layer] = self._gradient_buffers.get()
        return self._gradient_view(layer, buffer)

    def keep_gradient(self, layer: int) -> None:
        buffer = self._gradient_lent.pop(layer)
        place, size = self._gradient_places[layer], _gradient_bytes(self._parts[layer], self._gradient_dtype)
        written = self._write("gradient", layer, lambda: self._gradients.write(place, buffer[:size]))
        self._gradient_written[layer] = written
        self._after_write(written, lambda: self._gradient_buffers.put(buffer))

    def fetch_gradient(self, layer: int) -> Tensor:
        if layer in self._gradient_written:
            self._gradient_written[layer].result()
        buffer = self._gradient_lent[layer] = self._gradient_buffers.get()
        size = _gradient_bytes(self._parts[layer], self._gradient_dtype)
        self._gradients.read(self._gradient_places[layer], buffer[:size])
        return self._gradient_view(layer, buffer)

    def release_gradient(self, layer: int) -> None:
        self._gradient_buffers.put(self._gradient_lent.pop(layer))

    def commit(self, update: Update | None, layers: Sequence[int], note: Mapping[str, Any]) -> None:
        for written in (*self._gradient_written.values(), *self._written.values()):
            written.result()
        self._gradients.sync()
        changes = {"complete": True, "update": update, "layers": list(layers), "note": dict(note)}
        self._manifest = self._manifest.model_copy(update=changes)
        self._keep_manifest()

    def annotate(self, note: Mapping[str, Any]) -> None:
        """Make what is there durable, with another note."""
        self.commit(self._manifest.update, self._manifest.layers, note)

    def pending(self) -> dict[int, Update]:
        update = self._manifest.update
        layers = self._manifest.layers
        return {layer: update for layer in layers if update and self._states.steps[layer] < update.step}

    def close(self) -> None:
        self._writer.shutdown()
        self._states.close()
        self._gradients.close()
        os.close(self._lock)

    def _keep_manifest(self) -> None:
        write_text(self._folder / MANIFEST, self._manifest.model_dump_json(indent=2))

    def _write(self, what: str, layer: int, write: Callable[[], None]) -> Future[None]:
        """In the writer's thread, one after the other, up to the first that fails.

        What comes after a failed one must not be written: a new gradient would replace the one that an update which did
        not reach the disk is still to be made of.
        """

        def run() -> None:
            if self._failure:
                raise self._failure
            try:
                with self._trace.span("write", what, layer=layer):
                    write()
            except BaseException as error:
                self._failure = error
                raise

        return self._writer.submit(run)

    def _after_write(self, written: Future[None] | None, then: Callable[[], None]) -> None:
        if written and not written.done():
            self._writer.submit(then)
        else:
            then()

    def _views(self, layer: int, record: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        views, offset = {}, 0
        for name in names:
            in_memory = name == "weight" and layer in self._in_memory
            views[name] = self._tensor(layer, name, self._in_memory[layer] if in_memory else record[offset:])
            offset += aligned(self._parts[layer][name].nbytes)
        return views

    def _tensor(self, layer: int, name: str, buffer: Tensor) -> Tensor:
        part = self._parts[layer][name]
        return buffer[: part.nbytes].view(part.dtype)

    def _gradient_view(self, layer: int, buffer: Tensor) -> Tensor:
        numel = self._parts[layer]["weight"].numel
        return buffer[: numel * self._gradient_dtype.itemsize].view(self._gradient_dtype)


def _locked(folder: Path) -> int:
    """An open descriptor of the folder that no other process has locked; the lock ends with the process.

    Raises:
        UserError: another has.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: the store is in use by another process") from None
    return descriptor
