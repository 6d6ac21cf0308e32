from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptj_stream.errors import UserError
from gptj_stream.store import direct_io
from gptj_stream.store.direct_io import ALIGNMENT, DirectFile, aligned, aligned_buffer


def random_buffer(nbytes: int, seed: int = 0) -> torch.Tensor:
    buffer = aligned_buffer(nbytes)
    return buffer.random_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("nbytes", [1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT, (8 << 20) + 5, 3 * (8 << 20)])
def test_what_is_written_is_read(nbytes: int, tmp_path: Path) -> None:
    data = random_buffer(nbytes)
    assert len(data) == aligned(nbytes)
    assert data.data_ptr() % ALIGNMENT == 0
    file = DirectFile(tmp_path / "file", 2 * len(data), new=True)
    file.write(len(data), data)
    file.sync()
    back = aligned_buffer(nbytes)
    file.read(len(data), back)
    assert torch.equal(back, data)
    file.read(0, back)
    assert not back.any()  # space that was claimed and not written
    file.close()
    assert (tmp_path / "file").read_bytes()[len(data) :] == bytes(data.numpy())


def test_opened_again_it_keeps_what_it_holds(tmp_path: Path) -> None:
    data = random_buffer(ALIGNMENT)
    file = DirectFile(tmp_path / "file", ALIGNMENT, new=True)
    file.write(0, data)
    file.close()
    DirectFile(tmp_path / "file", ALIGNMENT, new=False).close()
    assert (tmp_path / "file").read_bytes() == bytes(data.numpy())
    with pytest.raises(UserError, match="has 4,096 bytes and should have 8,192; the store is damaged"):
        DirectFile(tmp_path / "file", 2 * ALIGNMENT, new=False)
    with pytest.raises(UserError, match="is not there and should have"):
        DirectFile(tmp_path / "none", ALIGNMENT, new=False)


def test_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A platform that has no O_DIRECT (macOS); a file system that refuses it takes the same way."""
    monkeypatch.delattr(direct_io.os, "O_DIRECT")
    file = DirectFile(tmp_path / "file", 4 << 20, new=True)
    assert not file.direct
    data = random_buffer(4 << 20)
    file.write(0, data)
    back = aligned_buffer(4 << 20)
    file.read(0, back)
    assert torch.equal(back, data)
    file.close()


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    file = DirectFile(tmp_path / "file", 2 * ALIGNMENT, new=True)
    with (tmp_path / "file").open("rb+") as other:
        other.truncate(ALIGNMENT)
    with pytest.raises(OSError, match=f"the file ends at byte {ALIGNMENT}"):
        file.read(0, aligned_buffer(2 * ALIGNMENT))
    file.close()


def test_a_disk_that_is_too_full(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(No space left on device|File too large), for 4,611,686,018,427,387,904 bytes"):
        DirectFile(tmp_path / "file", 1 << 62, new=True)
