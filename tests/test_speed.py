"""Measuring a machine on tiny shapes, and remembering it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gptj_stream import speed
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.model import Block, Head
from gptj_stream.optim import AdamW
from gptj_stream.report import Advance, Report
from gptj_stream.speed import Speed
from gptj_stream.store.direct_io import DirectFile

CPU = torch.device("cpu")
ALWAYS = ["memory", "optimizer", "block", "embedding and head"]


class Recorder(Report):
    """Notes what is measured."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def bar(self, what: str, total: float, *, steps: bool = False, every: int = 0) -> Iterator[Advance]:
        yield lambda done, name: self.names.append(name)
        assert len(self.names) == total + 1
        self.names.pop()


class Measured(NamedTuple):
    speed: Speed
    names: list[str]


class Bench:
    """`measure` with one cache and settings to change."""

    def __init__(self, config: ModelConfig, cache: Path) -> None:
        self.cache = cache
        self.settings: dict[str, Any] = {
            "config": config,
            "device": CPU,
            "dtype": torch.float32,
            "lengths": (24, 40),
            "optimizer": AdamW(),
            "cache": cache,
        }

    def measure(self, **changed: Any) -> Measured:
        report = Recorder()
        return Measured(speed.measure(**self.settings | {"report": report} | changed), report.names)


@pytest.fixture
def bench(small_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(speed, "_COPY_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "_UPDATE_ROWS", 64)
    monkeypatch.setattr(speed, "_DISK_BYTES", 1 << 25)
    return Bench(small_config, tmp_path / "cache" / "speed.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.mkdir()
    return path


def test_everything_is_measured(bench: Bench, folder: Path) -> None:
    found, names = bench.measure(folder=folder, lengths=[64], dtype=torch.bfloat16)
    values = json.loads(json.dumps(asdict(found)))
    assert values.pop("bus") is None
    assert all(0 < value < 1e15 for value in values.values())
    assert names == [*ALWAYS, "disk"]
    assert not [*folder.iterdir()]


@pytest.mark.gpu
def test_everything_is_measured_on_cuda(bench: Bench, cuda: torch.device) -> None:
    found, names = bench.measure(device=cuda)
    assert found.bus and found.bus > 0
    assert names == [*ALWAYS, "bus"]


def test_a_layer_is_charged_with_its_own_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (Block, Head):

        def slow(*arguments: Any, forward: Any = module.forward) -> Tensor:
            time.sleep(0.05)
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", slow)
    found, _ = bench.measure()
    assert min(found.block_forward, found.block_forward_kept, found.head) > 0.05
    assert max(found.block_backward, found.embed) < 0.05


def test_what_is_remembered_is_not_measured(bench: Bench) -> None:
    first = bench.measure().speed
    written = bench.cache.read_bytes()
    assert bench.measure() == (first, [])
    assert bench.cache.read_bytes() == written


class OtherAdamW(AdamW):
    """Another optimizer, which is all that counts."""


@pytest.mark.parametrize(
    ("changed", "measured"),
    [
        ({"lengths": (40, 24)}, []),  # the same documents
        ({"lengths": (64,)}, ["block", "embedding and head"]),
        ({"dtype": torch.bfloat16}, ["block", "embedding and head"]),
        ({"optimizer": AdamW(weight_decay=0.0)}, []),
        ({"optimizer": OtherAdamW()}, ["optimizer"]),
        ({"vocab_size": 120}, ["embedding and head"]),
        ({"n_inner": 80}, ["block"]),
        ({"n_layer": 5}, []),
        ({"n_embd": 32, "n_inner": 80}, ["block", "embedding and head"]),
    ],
    ids=str,
)
def test_only_what_is_missing_is_measured(bench: Bench, changed: dict[str, Any], measured: list[str]) -> None:
    first = asdict(bench.measure().speed)
    shape = {name: changed[name] for name in changed if name in ModelConfig.model_fields}
    config = bench.settings["config"].model_copy(update=shape)
    second, names = bench.measure(**{"config": config} | {name: changed[name] for name in changed if name not in shape})
    assert names == measured
    same = {name for name, value in asdict(second).items() if value == first[name]}
    if "block" not in measured:
        assert same >= {"block_forward", "block_forward_kept", "block_backward"}
    assert "copy" in same
    assert bench.measure().names == [], "what was there before stays"


def test_the_disk_is_remembered_by_itself(bench: Bench, folder: Path) -> None:
    first = bench.measure().speed
    assert first.disk_read is first.disk_write is None
    second, names = bench.measure(folder=folder)
    assert names == ["disk"]
    assert asdict(first).items() - asdict(second).items() == {("disk_read", None), ("disk_write", None)}
    assert bench.measure(folder=folder.parent, lengths=(8,)).names == ["block", "embedding and head"], "the same disk"


def test_refresh_measures_all_again(bench: Bench) -> None:
    first = bench.measure().speed
    second, names = bench.measure(refresh=True)
    assert names == ALWAYS
    assert second != first
    assert bench.measure() == (second, [])


@pytest.mark.parametrize("age", [speed.KEEP_SECONDS + 10, -3600], ids=["old", "from the future"])
def test_an_entry_that_is_not_of_this_week_is_measured_again(bench: Bench, age: float) -> None:
    bench.measure()
    entries = json.loads(bench.cache.read_text())
    (block,) = (key for key in entries if key.startswith("block"))
    entries[block]["measured"] = time.time() - age
    bench.cache.write_text(json.dumps(entries))
    assert bench.measure().names == ["block"]
    assert bench.measure().names == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"memory": 5}', b"[" * 100_000])
def test_a_damaged_cache_is_measured_again(bench: Bench, content: bytes) -> None:
    bench.cache.parent.mkdir()
    bench.cache.write_bytes(content)
    assert bench.measure().names == ALWAYS
    assert bench.measure().names == []


@pytest.mark.parametrize("values", [{}, {"copy": 0}, {"copy": float("nan")}, {"copy": "fast"}, {"update": 1}], ids=str)
def test_a_damaged_entry_is_measured_again(bench: Bench, values: dict[str, Any]) -> None:
    bench.measure()
    entries = json.loads(bench.cache.read_text())
    (memory,) = (key for key in entries if key.startswith("memory"))
    entries[memory]["values"] = values
    bench.cache.write_text(json.dumps(entries))
    assert "memory" in bench.measure().names
    assert bench.measure().names == []


def test_a_cache_that_cannot_be_written_is_done_without(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    cache = tmp_path / "file" / "speed.json"
    assert bench.measure(cache=cache).names == ALWAYS
    assert bench.measure(cache=cache).names == ALWAYS


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert speed.default_cache() == tmp_path / "gptj-stream" / "speed.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert speed.default_cache() == Path.home() / ".cache" / "gptj-stream" / "speed.json"


def test_a_folder_that_is_not_there_yet(bench: Bench, folder: Path) -> None:
    assert bench.measure(folder=folder / "new" / "run").speed.disk_read
    assert not [*folder.iterdir()]


def test_a_file_system_without_direct_io(bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tmpfs before Linux 6.6."""
    opened: list[int] = []

    def refusing(path: Any, flags: int, *arguments: Any, _open: Any = os.open, **named: Any) -> int:
        opened.append(flags & os.O_DIRECT)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O", str(path))
        return _open(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    found, _ = bench.measure(folder=folder)
    assert any(opened)
    assert found.disk_read and found.disk_write


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs")
def test_tmpfs(bench: Bench) -> None:
    before = set(Path("/dev/shm").iterdir())
    found, _ = bench.measure(folder=Path("/dev/shm"))
    assert found.disk_read and found.disk_write
    assert not [path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith(".gptj-speed-")]


def test_a_slow_disk_is_measured_in_less(bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_DISK_SECONDS", 0.01)
    monkeypatch.setattr(speed, "_DISK_BYTES", 1 << 28)
    calls: list[int] = []
    monkeypatch.setattr(DirectFile, "write", lambda self, offset, buffer: (calls.append(offset), time.sleep(0.02)))
    assert bench.measure(folder=folder).speed.disk_write
    assert calls == [0, 0]


def test_a_disk_that_fails_is_told(bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DirectFile, offset: int, buffer: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DirectFile, "write", full)
    with pytest.raises(UserError, match=r"disk: the speed of its disk cannot be measured: .*No space"):
        bench.measure(folder=folder)
    assert not [*folder.iterdir()]


def test_a_full_disk_is_told(bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30 << 20))
    with pytest.raises(UserError, match="less than 40 MiB free"):
        bench.measure(folder=folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_cannot_be_written_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    with pytest.raises(UserError, match="/proc: the speed of its disk cannot be measured"):
        bench.measure(folder=Path("/proc"))
