"""The archives that mesh-transformer-jax checkpoints are released as: a tar of shards, mostly compressed with zstd."""

from __future__ import annotations

import re
import shutil
import tarfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Self

import zstandard

from gptj_stream.errors import UserError
from gptj_stream.files import claimed_folder
from gptj_stream.report import gib

_ZSTD = b"\x28\xb5\x2f\xfd"
_WINDOW = 1 << 29  # bytes: what unpacking may take of memory
_MEMBER = re.compile(r"(shard_\d{1,4}/\d{1,2}\.npz|[^/]+\.json)")
_LEFT_FREE = 1 << 28
_LONGEST_NAME = 1 << 16


def is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(512)
    return start[:4] == _ZSTD or start[257:262] == b"ustar"


class _Header(tarfile.TarInfo):
    """Refuses long names and comments of a size that only an attack has; tarfile reads them into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        named = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if (header.type in named or header.type == tarfile.SOLARIS_XHDTYPE) and header.size > _LONGEST_NAME:
            raise ValueError(f"a name of {header.size} bytes")
        return header


class Unpacked:
    """An archive's shards in a folder beside it, which is deleted with this object, or with the program.

    Attributes:
        folder: with the shards.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        UserError: damaged, members with names that are not a checkpoint's, or more than the disk holds.
        """
        self.folder = path.with_name(f".{path.name}.unpacked")
        held = ExitStack()
        try:
            held.enter_context(claimed_folder(self.folder, path))
        except OSError as error:
            raise UserError(f"{path.parent}: {path.name} must be unpacked beside it: {error.strerror}") from None
        held.callback(shutil.rmtree, self.folder, ignore_errors=True)
        delete = weakref.finalize(self, held.close)
        try:
            _unpack(path, self.folder)
        except BaseException:
            delete()
            raise


def _unpack(path: Path, folder: Path) -> None:
    try:
        with _stream(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                if not member.isfile() or name.is_absolute() or ".." in name.parts:
                    raise UserError(f"{path}: {member.name} is a link, or lies outside the archive; refused")
                match = re.search(rf"(?:^|/){_MEMBER.pattern}$", member.name)
                if not match:
                    continue
                free = shutil.disk_usage(folder).free - _LEFT_FREE
                if member.size > free:
                    raise UserError(
                        f"{path}: {member.name} unpacks to {gib(member.size)}, {gib(max(0, free))} are free in "
                        f"{folder.parent}; move the archive to a larger disk"
                    )
                target = folder / match[1]
                target.parent.mkdir(exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                with target.open("xb") as out:
                    shutil.copyfileobj(source, out, 1 << 22)
                if target.stat().st_size != member.size:
                    raise UserError(f"{path}: the archive ends in the middle of {member.name}; fetch it again")
    except UserError:
        raise
    # tarfile lets some of what damaged headers do through as it is
    except (tarfile.TarError, zstandard.ZstdError, FileExistsError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged: {error}; fetch it again") from None


@contextmanager
def _stream(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        if file.read(4) != _ZSTD:
            file.seek(0)
            yield file
            return
        file.seek(0)
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file) as reader:
            yield reader
