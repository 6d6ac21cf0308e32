"""A file read and written past the page cache, by several threads, from buffers that suit the disk."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gptj_stream.errors import UserError

ALIGNMENT = 4096
"""Offsets, lengths and addresses of direct I/O are multiples of this (a page; enough for any common disk)."""

_CHUNK = 8 << 20  # bytes a system call; below about 1 MiB the calls cost more than the disk
_THREADS = 4


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned_buffer(nbytes: int, *, pinned: bool = False) -> Tensor:
    """(aligned(nbytes),) uint8 of CPU memory that begins on a page.

    Args:
        pinned: lock it for copies to and from CUDA. PyTorch's own pinned allocator rounds up to powers of two, which
            makes 403 MB of a GPT-J block 537.
    """
    memory = mmap.mmap(-1, max(ALIGNMENT, aligned(nbytes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
    return buffer


class DirectFile:
    """One file of fixed size.

    Attributes:
        direct: whether it is past the page cache; where the file system has no direct I/O, pages are dropped after use.
    """

    def __init__(self, path: Path, nbytes: int, *, new: bool) -> None:
        """Open `path`, or make it of zeros: `nbytes` of space that is really there.

        Raises:
            UserError: it is not new, and is not there or has another size.
            OSError: it cannot be made, or the disk is too full.
        """
        if new:
            _claim(path, nbytes)
        elif not path.is_file() or path.stat().st_size != nbytes:
            size = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is not there"
            raise UserError(f"{path} {size} and should have {nbytes:,}; the store is damaged and cannot be used")
        self.path = path
        flags = os.O_RDWR
        try:
            self._file = os.open(path, flags | getattr(os, "O_DIRECT", 0))
            self.direct = hasattr(os, "O_DIRECT")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file = os.open(path, flags)
            self.direct = False
        self._threads = ThreadPoolExecutor(_THREADS, "disk")

    def read(self, offset: int, buffer: Tensor) -> None:
        """Fill `buffer`, uint8, from `offset`; both aligned."""
        self._transfer(os.preadv, offset, buffer)

    def write(self, offset: int, buffer: Tensor) -> None:
        """Write `buffer`, uint8, at `offset`; both aligned."""
        self._transfer(os.pwritev, offset, buffer)

    def sync(self) -> None:
        """Return when everything written is on the disk."""
        os.fdatasync(self._file)

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._file)

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], offset: int, buffer: Tensor) -> None:
        assert offset % ALIGNMENT == len(buffer) % ALIGNMENT == 0
        memory = memoryview(buffer.numpy())  # type: ignore[arg-type]

        def chunk(start: int) -> None:
            end = min(start + _CHUNK, len(memory))
            first = start
            while start < end:
                count = call(self._file, [memory[start:end]], offset + start)
                if count <= 0:
                    raise OSError(errno.EIO, f"the file ends at byte {offset + start}", str(self.path))
                start += count
            if not self.direct:
                os.posix_fadvise(self._file, offset + first, end - first, os.POSIX_FADV_DONTNEED)

        for _ in self._threads.map(chunk, range(0, len(memory), _CHUNK)):
            pass


def _claim(path: Path, nbytes: int) -> None:
    path.unlink(missing_ok=True)
    # not through a direct descriptor: where the file system cannot reserve space, the C library writes single bytes
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            path.unlink()
            raise OSError(error.errno, f"{error.strerror}, for {nbytes:,} bytes", str(path)) from None
