"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptj_stream.errors import UserError
from gptj_stream.files import new_folder, read_json, write_text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "expected a JSON object, found a list"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_json_that_is_no_object(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


def test_a_text_that_fails_to_write_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    write_text(path, "old: ä\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new: \ud800\n")
    assert path.read_text(encoding="utf-8") == "old: ä\n"
    write_text(path, "new: 1\n")
    assert path.read_text() == "new: 1\n"
    assert [file.name for file in tmp_path.iterdir()] == ["x.yaml"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with new_folder(path) as temporary:
            (temporary / name).write_text(name)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "file").write_text(name)
    assert sorted(file.name for file in path.iterdir()) == ["second", "sub"]
    assert [file.name for file in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_new_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(error), new_folder(path) as temporary:
        (temporary / "new").write_text("new")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    assert [file.name for file in path.iterdir()] == ["old"]


def test_a_killed_process_leaves_the_old_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as temporary:
        (temporary / "old").write_text("old")
    code = (
        "import pathlib, sys, time\n"
        "from gptj_stream.files import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'half').write_text('half')\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    half = tmp_path / ".folder.tmp" / "half"
    deadline = time.monotonic() + 30
    while not half.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert half.exists()
    assert [file.name for file in path.iterdir()] == ["old"]
    with new_folder(path) as temporary:
        assert not list(temporary.iterdir())
        (temporary / "new").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    assert [file.name for file in path.iterdir()] == ["new"]
