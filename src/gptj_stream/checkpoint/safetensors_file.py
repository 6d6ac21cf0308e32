"""safetensors files: read by the library's own reader, written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptj_stream.checkpoint.tensors import StoredTensor
from gptj_stream.errors import UserError
from gptj_stream.layout import Slot

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors, none of them read.

    Raises:
        UserError: damaged, or a dtype that is not known.
    """
    tensors = {}
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118
            there = file.get_slice(name)
            tag = there.get_dtype()
            if tag not in _DTYPES:
                raise UserError(f"{path}: {name} has dtype {tag}, which cannot be read")
            tensors[name] = _stored(path, name, tuple(there.get_shape()), _DTYPES[tag])
    return tensors


class Sink(Protocol):
    def write(self, data: Any, /) -> int: ...


def write_safetensors(out: Sink, slots: Sequence[Slot], dtype: torch.dtype, pieces: Iterable[Tensor]) -> None:
    """One file, whatever its size with little memory (the library's own writer wants all tensors at once).

    8 bytes of header length, a JSON header padded with spaces to a multiple of 8, the tensors end to end.

    Args:
        slots: names and shapes, in the order of the file.
        pieces: their values, end to end: rows of the first one in one or more pieces, of the next, and so on.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the "format"
    end = 0
    for slot in slots:
        start, end = end, end + slot.numel * dtype.itemsize
        header[slot.name] = {"dtype": _TAGS[dtype], "shape": slot.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for piece in pieces:
        end -= out.write(piece.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data)
    assert not end, "the pieces are the tensors, no more and no less"


def _stored(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        # opened each time: the pages of an open file that were read count as this process's memory
        with _open(path) as file:
            rows: Tensor = file.get_slice(name)[start:stop] if shape else file.get_tensor(name).reshape(1)
        return rows

    return StoredTensor(path, shape, dtype, read_rows)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors: {error}") from None
