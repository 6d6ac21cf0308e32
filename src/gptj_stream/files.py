"""Reading JSON objects; writing files and folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj_stream.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        UserError: unreadable, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also a number or a nesting beyond Python's limits
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name, synced and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling to fill; becomes `path`, replacing what is there, when the block ends without an error.

    Whatever happens, `path` or `.name.old` beside it is whole; the next call, or `recover`, puts the old one back.
    """
    path = path.resolve()  # through links, and `.` has no name of its own
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), set_aside_path(path)
    with claimed_folder(temporary, path):
        recover(path)
        yield from _replace(path, temporary, old)


def _replace(path: Path, temporary: Path, old: Path) -> Iterator[Path]:
    try:
        yield temporary
        sync_tree(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        recover(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def claimed_folder(folder: Path, purpose: Path) -> Iterator[Path]:
    """An empty folder that no other process makes or deletes meanwhile; one left by a process that was killed goes.

    Raises:
        UserError: another process has it; the message says what it is for.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        pass
    else:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{purpose}: another process is at it; wait for that, or name another") from None
        finally:
            os.close(descriptor)
        shutil.rmtree(folder)
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Move folder `path` away for the block; delete it when the block ends, put it back if that fails."""
    path = path.resolve()
    path.rename(set_aside_path(path))
    try:
        yield
    except BaseException:
        recover(path, replaced=False)
        raise
    recover(path, replaced=True)


def recover(path: Path, *, replaced: bool | None = None) -> None:
    """Undo a replacement of folder `path` that was cut short, or clear away what it replaced.

    Args:
        replaced: whether the new folder is whole; by default, if it is there.
    """
    path = path.resolve()
    old = set_aside_path(path)
    if old.exists() and not (path.exists() if replaced is None else replaced):
        shutil.rmtree(path, ignore_errors=True)
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def set_aside_path(path: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return path.with_name(f".{path.name}.old")
