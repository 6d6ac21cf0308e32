from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_stream.data.sources import Document, ReadStats, read_documents, source_files
from gptj_stream.errors import UserError


def text(value: str) -> Document:
    return Document(((value, True),))


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffline\r\n\nwörld\n".encode())
    (tmp_path / "b.MD").write_text("# title")
    stats = ReadStats()
    assert list(read_documents([tmp_path / "a.txt", tmp_path / "b.MD"], stats)) == [
        text("line\r\n\nwörld\n"),
        text("# title"),
    ]
    assert stats.bytes_read == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one", "id": 1}\n'
        b"\n  \r\n"
        b'{"prompt": "Q", "completion": "A\\u2028B"}\r\n'
        b'{"text": ""}\n'
        b'{"prompt": "Q", "completion": ""}\n'
        b'{"prompt": "", "completion": "A"}'  # no newline at the end
    )
    stats = ReadStats()
    assert list(read_documents([path], stats)) == [
        text("one"),
        Document((("Q", False), ("A\u2028B", True))),
        Document((("", False), ("A", True))),
    ]
    assert stats == ReadStats(path.stat().st_size, Counter({"empty text": 1, "empty completion": 1}))


def test_jsonl_is_read_line_by_line(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(*({"text": "x" * 100} for _ in range(100)))
    stats = ReadStats()
    next(read_documents([path], stats))
    assert stats.bytes_read == path.stat().st_size // 100


def test_folders(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/c.md", ".hidden/d.txt", "._b.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert source_files([tmp_path]) == [tmp_path / name for name in ("a/c.md", "a/z.jsonl", "b.txt")]


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: not found; name a \.txt, \.md, \.jsonl file"):
        list(read_documents([tmp_path / "gone.txt"]))
    with pytest.raises(UserError, match=r"no \.txt, \.md, \.jsonl files in this folder"):
        list(read_documents([tmp_path]))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"unsupported file type '\.pdf'; supported are \.txt, \.md, \.jsonl"):
        list(read_documents([tmp_path / "a.pdf"]))
    (tmp_path / "a.txt").touch()
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match=r"a\.txt: the file is empty \(0 bytes\)"):
            list(read_documents([path]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"not valid JSON \(Expecting value at column 9\)"),
        (b'["text"]', "a JSON list, not an object"),
        (
            b'{"body": "x", "prompt": "y"}',
            r'fields are body, prompt; a record needs {"text"} or {"prompt", "completion"}',
        ),
        (b"{}", "fields are none"),
        (b'{"text": "x", "prompt": "y", "completion": "z"}', r"has both text and prompt \+ completion"),
        (b'{"text": 3}', "text is 3, not a string"),
        (b'{"prompt": "x", "completion": null}', "completion is None, not a string"),
        (b'{"text": "caf\xe9"}', r"invalid UTF-8 at byte 13 \(invalid continuation byte\)"),
        (b'{"text": "ab\\ud800"}', "text has half a surrogate pair at character 2"),
    ],
)
def test_bad_records(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: {message}") as caught:
        list(read_documents([path]))
    assert "\n" not in str(caught.value)


def test_bad_text(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 ol\xe9")
    with pytest.raises(UserError, match=r"bad\.txt: invalid UTF-8 at byte 3 "):
        list(read_documents([tmp_path / "bad.txt"]))
