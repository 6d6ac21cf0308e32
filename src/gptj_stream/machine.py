"""What this machine is and can do: device, native precision, free memory, matrix speed."""

from __future__ import annotations

import ctypes
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.nn.functional as F

from gptj_stream.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that an option names.

    Raises:
        UserError: CUDA is asked for and there is none, or not so many.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}: give cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a precision option means here.

    Raises:
        UserError: no such precision.
    """
    if precision == "auto":
        precision = "bf16" if _multiplies_bf16(device) else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise UserError(f"precision is {precision!r}: give fp32, bf16 or auto")
    return dtypes[precision]


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere on
    cpu = torch.backends.cpu.get_cpu_capability()
    return cpu.startswith("AVX512") and bool(torch.cpu._is_avx512_bf16_supported())


def gemm_flops(device: torch.device, dtype: torch.dtype, width: int, rows: int = 2048) -> float:
    """FLOP/s of a (rows, width) x (width, 4 width) product, the model's ceiling here. Takes under a second."""
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    seconds: list[float] = []
    deadline = time.perf_counter() + 0.5
    while len(seconds) < 3 or (time.perf_counter() < deadline and len(seconds) < 25):
        start = time.perf_counter()
        F.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * rows * width * 4 * width / median(seconds)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, within the process's memory cgroup."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # ours to use again
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(psutil.virtual_memory().available, _cgroup_headroom())


def _cgroup_headroom() -> int:
    """Bytes left under the container's limit; sizes the kernel cannot have mean no limit (cgroup v2, then v1)."""
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((root / limit).read_text()) - int((root / used).read_text())
        except (OSError, ValueError):  # absent, or the word "max"
            continue
    return 1 << 62


def return_freed_memory() -> None:
    """Have every tensor of a megabyte or more go back to the system when it is freed.

    By default the C library keeps pieces of up to 32 MiB, in the hope to use them again. Activations that live from
    forward to backward lie between them, so the process grows by a quarter beyond what it holds.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the device's memory on CUDA, of this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # noqa: PLC0415  (not on Windows)
    except ImportError:
        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024  # kilobytes on Linux
