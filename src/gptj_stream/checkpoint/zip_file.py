"""Members of zip archives as they are stored: PyTorch's `.bin` files and NumPy's `.npz` are archives of raw arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

from gptj_stream.errors import UserError

_LOCAL_HEADER = 30
_MOST_MEMBERS = 100_000


class Member(NamedTuple):
    """A member's bytes, by where they lie in the archive."""

    offset: int
    nbytes: int


def members(path: Path) -> dict[str, Member]:
    """All members of an archive, none of them read.

    Raises:
        UserError: not a whole zip archive, or members that are compressed, encrypted or beyond the file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = archive.infolist()
            if len(infos) > _MOST_MEMBERS:
                raise UserError(f"{path}: {len(infos)} members in one archive; this is not a checkpoint")
            size = path.stat().st_size
            found: dict[str, Member] = {}
            for info in infos:
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise UserError(f"{path}: {info.filename} is compressed or encrypted; save the file without that")
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
                if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
                    raise UserError(f"{path}: damaged: {info.filename} is not where the archive says")
                # the lengths of name and extra field, which differ from those in the archive's own list
                lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                member = Member(info.header_offset + _LOCAL_HEADER + lengths, info.file_size)
                if member.offset + member.nbytes > size or info.filename in found:
                    raise UserError(f"{path}: damaged: {info.filename} is there twice, or lies beyond the file's end")
                found[info.filename] = member
            return found
    except UserError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a whole zip archive: {error}; fetch it again") from None
