"""PyTorch's own files (`pytorch_model.bin`), in the zip layout and in the pickle layout from before 1.6.

A pickle is a program. This reader runs the few instructions that a state dict is written with, and knows the few names
that one refers to; anything else is refused, and nothing of it is executed. Names of storages become places in the
file, so opening reads no weights.

Both layouts are those of PyTorch's torch/serialization.py.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from gptj_stream.checkpoint.tensors import StoredTensor, read_exactly
from gptj_stream.checkpoint.zip_file import Member, members
from gptj_stream.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the pickle layout's first object
_PROTOCOL = 1001
_MOST_PICKLE = 4 << 20  # GPT-J-6B's is 60 kB; an attack's would become some hundred MB of small objects
_MOST_DIMENSIONS = 8

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _RefusedError(Exception):
    """The pickle holds what a state dict does not; the text says what."""


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor as a pickle has it: elements of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def last(self) -> int:
        """The highest element that it touches; `offset` - 1 if it has none."""
        if 0 in self.shape:
            return self.offset - 1
        return self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict, none of them read.

    Raises:
        UserError: damaged, not a state dict, or a file that asks for more than one.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        values, places = _read_zip(path) if is_zip else _read_pickles(path)
    except UserError:
        raise
    except _RefusedError as refused:
        raise UserError(f"{path}: refused: {refused}; a checkpoint of tensors alone has no such thing") from None
    except Exception as error:  # whatever damaged bytes make of the unpickler
        raise UserError(f"{path}: damaged, or not a PyTorch checkpoint: {type(error).__name__} {error}") from None
    return {name: _stored(path, name, view, places) for name, view in _state_dict(path, values).items()}


def _state_dict(path: Path, values: object) -> dict[str, _View]:
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a dict of tensors")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, _View):
            raise UserError(f"{path}: {name!r:.60} is no tensor; save the model's state_dict alone")
    if not values:
        raise UserError(f"{path}: holds no tensor")
    return values


def _stored(path: Path, name: str, view: _View, places: Mapping[str, Member]) -> StoredTensor:
    storage = view.storage
    place = places.get(storage.key)
    if place is None:
        raise UserError(f"{path}: the values of {name} are not in the file")
    size = storage.dtype.itemsize
    # more values than the storage has are an expanded view, or a bomb
    if storage.numel * size > place.nbytes or view.last >= storage.numel or math.prod(view.shape) > storage.numel:
        raise UserError(
            f"{path}: {name} of shape {view.shape} needs more values than the {place.nbytes // size} stored for it; "
            "the file is damaged"
        )

    def read_rows(start: int, stop: int) -> Tensor:
        shape, stride = (stop - start, *view.shape[1:]), view.stride or (1,)
        rows = _View(storage, view.offset + start * stride[0], shape, stride)
        numel = rows.last + 1 - rows.offset
        values = read_exactly(path, place.offset + rows.offset * size, numel, storage.dtype)
        return values.as_strided(shape, stride)

    # rows that lie across one another, as of a transposed matrix, are read together
    across = len(view.shape) > 1 and view.stride[0] < max(view.stride[1:])
    return StoredTensor(path, view.shape, storage.dtype, read_rows, view.shape[0] if across else 0)


def _read_zip(path: Path) -> tuple[object, dict[str, Member]]:
    found = members(path)
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip archive, but not PyTorch's: it has {len(pickles)} data.pkl, not one")
    folder = pickles[0].removesuffix("data.pkl")
    order = _small(path, found, f"{folder}byteorder") or b"little"
    if order.decode() != "little" or sys.byteorder != "little":
        raise UserError(f"{path}: its byte order is {order.decode()}; only little-endian files are read")
    values = _Unpickler(io.BytesIO(_small(path, found, pickles[0]))).load()
    places = {name.removeprefix(f"{folder}data/"): member for name, member in found.items()}
    return values, places


def _small(path: Path, found: Mapping[str, Member], name: str) -> bytes:
    member = found.get(name, Member(0, 0))
    if member.nbytes > _MOST_PICKLE:
        raise UserError(f"{path}: {name} is {member.nbytes} bytes; a state dict's is far smaller")
    return read_exactly(path, member.offset, member.nbytes, torch.uint8).numpy().tobytes()


def _read_pickles(path: Path) -> tuple[object, dict[str, Member]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        limited = _Limited(file)
        if _Unpickler(limited).load() != MAGIC or _Unpickler(limited).load() != _PROTOCOL:
            raise UserError(f"{path}: not a PyTorch checkpoint")
        system = _Unpickler(limited).load()
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise UserError(f"{path}: its byte order is big; only little-endian files are read")
        unpickler = _Unpickler(limited)
        values = unpickler.load()
        places: dict[str, Member] = {}
        keys: Any = _Unpickler(limited).load()
        offset = file.tell()
        for key in keys:  # each storage: its number of elements, then those
            file.seek(offset)
            numel = int.from_bytes(file.read(8), "little")
            storage = unpickler.storages.get(key)
            if storage is None or storage.numel != numel or offset + 8 + numel * storage.dtype.itemsize > size:
                raise UserError(f"{path}: the file is damaged or ends before its tensors do; fetch it again")
            places[key] = Member(offset + 8, numel * storage.dtype.itemsize)
            offset += 8 + places[key].nbytes
    return values, places


class _Limited:
    """A file of which only so much can be read: a pickle is small beside the weights that follow it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = _MOST_PICKLE

    def read(self, count: int = -1) -> bytes:
        return self._taken(self._file.read(min(count, self._left) if count >= 0 else self._left))

    def readline(self, count: int = -1) -> bytes:
        return self._taken(self._file.readline(min(count, self._left) if count >= 0 else self._left))

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    _requires_grad: object = None,
    _hooks: object = None,
    metadata: object = None,
) -> _View:
    """torch._utils._rebuild_tensor_v2 (and _rebuild_tensor, which ends with the strides)."""
    if metadata:
        raise _RefusedError("a tensor that is the negative or the conjugate of what is stored")
    sizes = [offset, *shape, *stride] if isinstance(shape, tuple) and isinstance(stride, tuple) else [None]
    if not isinstance(storage, _Storage) or not all(type(n) is int and 0 <= n < 1 << 63 for n in sizes):
        raise _RefusedError("a tensor that is not made from a storage")
    assert isinstance(shape, tuple)
    assert isinstance(stride, tuple)
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise _RefusedError(f"a tensor of {len(shape)} dimensions and {len(stride)} strides")
    return _View(storage, offset, shape, stride)  # type: ignore[arg-type]


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _ordered_dict(pairs: object = ()) -> OrderedDict[Any, Any]:
    if pairs not in ((), []):
        raise _RefusedError("an OrderedDict made from something")
    return OrderedDict()


_NAMES: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise _RefusedError(f"the pickle instruction {bytes([code])!r}")


_PYTHONS: Any = pickle._Unpickler


class _Unpickler(_PYTHONS):  # type: ignore[misc]
    """Python's own unpickler, of which only the instructions in `_INSTRUCTIONS` are left."""

    dispatch: ClassVar[_Dispatch] = _Dispatch()

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> object:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _RefusedError(f"it names {module}.{name}") from None

    def persistent_load(self, reference: object) -> _Storage:
        match reference:
            # the pickle layout adds a view of the storage, which PyTorch has long left empty
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel), *view) if (
                0 <= numel < 1 << 63 and view in ([], [None])
            ):
                pass
            case _:
                raise _RefusedError("a storage of a kind that state dicts do not have")
        return self.storages.setdefault(key, _Storage(key, dtype, numel))

    def no_state(self) -> None:
        """Of BUILD: a state dict's is `_metadata`, versions of modules, which is not needed."""
        self.stack.pop()

    def call(self) -> None:
        """REDUCE, of the functions in `_NAMES` alone."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not callable(function) or function not in _NAMES.values() or not isinstance(arguments, tuple):
            raise _RefusedError("a call of something that is no function of PyTorch's")
        self.stack[-1] = function(*arguments)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def set_items(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: object, value: object) -> None:
        if not isinstance(key, str) or not isinstance(self.stack[-1], dict):
            raise _RefusedError(f"a dict whose keys are of type {type(key).__name__}")
        self.stack[-1][key] = value


_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "GLOBAL STACK_GLOBAL BINPERSID"
)
for _name in _INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Unpickler.dispatch[_code] = _PYTHONS.dispatch[_code]
_Unpickler.dispatch[pickle.BUILD[0]] = _Unpickler.no_state
_Unpickler.dispatch[pickle.REDUCE[0]] = _Unpickler.call
_Unpickler.dispatch[pickle.SETITEM[0]] = _Unpickler.set_item
_Unpickler.dispatch[pickle.SETITEMS[0]] = _Unpickler.set_items
