"""The user's files as documents."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptj_stream.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document: its (text, carries_loss) pieces in order."""

    pieces: tuple[tuple[str, bool], ...]


@dataclass
class ReadStats:
    """What `read_documents` has done so far.

    Attributes:
        bytes_read: how far reading has come, in bytes of the source files.
        skipped: documents left out, by reason.
    """

    bytes_read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def source_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` stand for: files as they are, folders as their supported files, sorted, recursively.

    Hidden files and folders inside a folder are left out.

    Raises:
        UserError: a path that is missing, of an unsupported kind or empty.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix.lower() in READERS]
            inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not inside:
                raise UserError(f"{path}: no {_supported()} files in this folder")
            found += inside
        elif not path.is_file():
            raise UserError(f"{path}: not found; name a {_supported()} file, or a folder of them")
        elif path.suffix.lower() not in READERS:
            raise UserError(f"{path}: unsupported file type {path.suffix!r}; supported are {_supported()}")
        else:
            found.append(path)
    for path in found:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty (0 bytes); remove it or fill it")
    return found


def read_documents(paths: Sequence[Path], stats: ReadStats | None = None) -> Iterator[Document]:
    """The documents of files and folders, in order; those without text to learn are left out and counted in `stats`.

    Memory: one `.txt` or `.md` file, or one line of a `.jsonl` file, at a time.

    Raises:
        UserError: a path that cannot be read or a malformed record, as `file:line`.
    """
    stats = stats if stats is not None else ReadStats()
    for path in source_files(paths):
        for document in READERS[path.suffix.lower()](path, stats):
            if any(text and carries_loss for text, carries_loss in document.pieces):
                yield document
            else:
                stats.skipped["empty text" if len(document.pieces) == 1 else "empty completion"] += 1


def _read_text(path: Path, stats: ReadStats) -> Iterator[Document]:
    """A whole file as one document."""
    data = path.read_bytes()
    stats.bytes_read += len(data)
    yield Document(((_decode(data.removeprefix(codecs.BOM_UTF8), str(path)), True),))


def _read_jsonl(path: Path, stats: ReadStats) -> Iterator[Document]:
    """A document a line: {"text"} or {"prompt", "completion"}; other fields are ignored."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            stats.bytes_read += len(line)
            record = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
            if record:
                yield _record(record, f"{path}:{number}")


def _record(line: bytes, where: str) -> Document:
    """One line of a `.jsonl` file; `where` is its file:line."""
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); one object a line") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise UserError(f"{where}: cannot be read ({error}); shorten it") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object; one object a line")
    has_text, has_pair = "text" in record, "prompt" in record and "completion" in record
    if has_text and has_pair:
        raise UserError(f"{where}: has both text and prompt + completion; keep one of the two")
    if has_text:
        return Document(((_string(record, "text", where), True),))
    if has_pair:
        return Document(((_string(record, "prompt", where), False), (_string(record, "completion", where), True)))
    present = ", ".join(record) or "none"
    raise UserError(f'{where}: fields are {present}; a record needs {{"text"}} or {{"prompt", "completion"}}')


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} is {value!r:.40}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {name} has half a surrogate pair at character {error.start}; remove it") from None
    return value


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start} ({error.reason}); convert it to UTF-8") from None


def _supported() -> str:
    return ", ".join(READERS)


READERS: dict[str, Callable[[Path, ReadStats], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
}
"""File formats, by extension."""
