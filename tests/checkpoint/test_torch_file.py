"""PyTorch's files: what torch.save writes is read to the bit, and what is not a state dict is refused, not executed."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptj_stream.checkpoint.tensors import StoredTensor
from gptj_stream.checkpoint.torch_file import read_torch_file
from gptj_stream.errors import UserError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])


def save(values: object, path: Path, *, zipped: bool) -> Path:
    torch.save(values, path, _use_new_zipfile_serialization=zipped)
    return path


def whole(tensor: StoredTensor) -> Tensor:
    pieces = [tensor.read_rows(start, stop) for start, stop in tensor.steps()]
    return torch.cat(pieces) if pieces else tensor.read_rows(0, 0)


def assert_read(path: Path, expected: dict[str, Tensor]) -> None:
    found = read_torch_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(whole(found[name]).view(tensor.shape), tensor), name


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_a_state_dict(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    values = {
        "a": torch.randn(5, 7).mul(10).to(dtype),
        "b.c": torch.ones(3, dtype=dtype),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(2.5),
    }
    assert_read(save(values, tmp_path / "w.bin", zipped=zipped), values)


@LAYOUTS
def test_a_modules_own_with_parameters_and_metadata(zipped: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    path = save(module.state_dict(), tmp_path / "w.bin", zipped=zipped)
    assert_read(path, {name: each.detach() for name, each in module.state_dict().items()})
    save(OrderedDict(module.named_parameters()), path, zipped=zipped)
    assert_read(path, {name: each.detach() for name, each in module.named_parameters()})


@LAYOUTS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(protocol: int, zipped: bool, tmp_path: Path) -> None:
    values = OrderedDict(a=torch.randn(3, 2), b=torch.arange(4))
    path = tmp_path / "w.bin"
    torch.save(values, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_read(path, values)


@LAYOUTS
def test_views_of_larger_storages(zipped: bool, tmp_path: Path) -> None:
    """Slices, transposed and shared tensors, which a file stores with all of what they are views of."""
    large = torch.randn(40, 30)
    values = {
        "rows": large[10:20], "columns": large[:, 5:9], "transposed": large.T, "every": large[::3, 1::2],
        "same": large, "expanded": large[:1].expand(6, 30), "turned": torch.randn(2, 3, 4).permute(2, 0, 1),
    }  # fmt: skip
    assert_read(save(values, tmp_path / "w.bin", zipped=zipped), values)


@LAYOUTS
def test_a_state_dict_inside(zipped: bool, tmp_path: Path) -> None:
    values = {"a": torch.randn(2, 2)}
    assert_read(save({"state_dict": values, "epoch": 3}, tmp_path / "w.bin", zipped=zipped), values)


@LAYOUTS
def test_a_negative_bit_is_refused(zipped: bool, tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j]).conj().imag
    assert value.is_neg()
    with pytest.raises(UserError, match=r"the negative or the conjugate of what is stored"):
        read_torch_file(save({"a": value}, tmp_path / "w.bin", zipped=zipped))


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


@LAYOUTS
@pytest.mark.parametrize(
    "value",
    [
        Calls(os.system, "touch executed"),
        Calls(exec, "open('executed', 'w')"),
        Calls(eval, "open('executed', 'w')"),
        Calls(getattr, os, "system"),
        Calls(torch.load, "executed"),
        Calls(OrderedDict, ((("a", Calls(os.system, "touch executed")),),)),
    ],
    ids=["system", "exec", "eval", "getattr", "torch.load", "inside a dict"],
)
def test_nothing_is_executed(value: object, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.bin"
    try:
        save({"a": torch.ones(2), "b": value}, path, zipped=zipped)
    except (TypeError, pickle.PicklingError):  # a module cannot be pickled: by hand
        path.write_bytes(b"\x80\x02cos\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.")
    with pytest.raises(UserError, match=r"w\.bin: (refused: |damaged)"):
        read_torch_file(path)
    assert not (tmp_path / "executed").exists()


def zip_with(path: Path, program: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, content in members.items():
            archive.writestr(f"x/data/{name}", content)
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%btQ"
TENSOR = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"%b%b%b\x89NtRs."


def program(numel: int, offset: int, shape: bytes, stride: bytes) -> bytes:
    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    return TENSOR % (number(numel), number(offset), shape, stride)


def test_the_programs_below_are_what_a_tensor_is_written_as(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "w.bin", program(3, 1, b"K\x02\x85", b"K\x01\x85"), **{"0": struct.pack("<3f", 1, 2, 3)})
    assert_read(path, {"a": torch.tensor([2.0, 3.0])})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (program(3, 2, b"K\x02\x85", b"K\x01\x85"), "needs more values than the 3 stored"),
        (program(3, 0, b"K\x02\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"), "needs more values"),
        (program(1 << 62, 0, b"\x8a\x08" + b"\x00" * 7 + b"\x40\x85", b"K\x01\x85"), "needs more values"),
        (program(3, 0, b"\x8a\x08" + b"\x00" * 5 + b"\x01\x00\x00\x85", b"K\x00\x85"), "needs more values"),
        (b"\x80\x02}K\x01K\x01s.", "a dict whose keys are of type int"),
        (b"\x80\x02I99999999999\n.", "the pickle instruction b'I'"),
        (program(-3, 0, b"K\x02\x85", b"K\x01\x85"), "a storage of a kind"),
        (program(3, -1, b"K\x02\x85", b"K\x01\x85"), "not made from a storage"),
        (program(3, 0, b"K\x02K\x02\x86", b"K\x01\x85"), "2 dimensions and 1 strides"),
        (b"\x80\x02]a.", "damaged"),
        (b"\x80\x02K\x05.", "holds a int, not a dict of tensors"),
        (b"\x80\x02}.", "holds no tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x05s.", "'a' is no tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00a" + b")" + b"\x85" * 200_000 + b"s.", "'a' is no tensor"),
        (b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.", "a dict whose keys are of type tuple"),
        (b"\x80\x02\x8f(K\x01\x90.", "the pickle instruction"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x63}.", "damaged"),
    ],
)  # fmt: skip
def test_programs_that_lie(content: bytes, message: str, tmp_path: Path) -> None:
    path = zip_with(tmp_path / "w.bin", content, **{"0": struct.pack("<3f", 1, 2, 3)})
    with pytest.raises(UserError, match=message) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)


@LAYOUTS
def test_every_truncation_is_noticed(zipped: bool, tmp_path: Path) -> None:
    content = save({"a": torch.randn(30), "b": torch.randn(4, 4)}, tmp_path / "w.bin", zipped=zipped).read_bytes()
    path = tmp_path / "cut.bin"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(UserError):
            for tensor in read_torch_file(path).values():
                whole(tensor)


def test_archives_that_are_not_pytorchs(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(UserError, match=r"a zip archive, but not PyTorch's"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + b" " * 100)
    with pytest.raises(UserError, match=r"data\.pkl is compressed or encrypted"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/byteorder", "big")
    with pytest.raises(UserError, match=r"its byte order is big"):
        read_torch_file(path)
    zip_with(path, program(3, 0, b"K\x02\x85", b"K\x01\x85"))
    with pytest.raises(UserError, match=r"the values of a are not in the file"):
        read_torch_file(path)
