from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_stream.data import tokens as module
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import TokenDataset, is_dataset, prepare, split_text
from gptj_stream.errors import UserError

RECORDS = (
    {"text": "Once upon a time <|endoftext|> there was 日本."},
    {"prompt": "Q: 1+1?\nA:", "completion": " 2"},
    {"text": ""},
    {"prompt": "", "completion": "x"},
)


@pytest.fixture
def prepared(small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> TokenDataset:
    return prepare([write_jsonl(*RECORDS)], small_tokenizer, tmp_path / "tokens")


def test_documents_come_back(tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    dataset = prepare([write_jsonl(*RECORDS)], tokenizer, tmp_path / "tokens")
    eos = tokenizer.eos_token_id
    story, prompt, completion = (
        tokenizer.encode(t) for t in (RECORDS[0]["text"], RECORDS[1]["prompt"], RECORDS[1]["completion"])
    )
    expected = [
        ([*story, eos], [1] * (len(story) + 1)),
        ([*prompt, *completion, eos], [0] * len(prompt) + [1] * (len(completion) + 1)),
        ([*tokenizer.encode("x"), eos], [1, 1]),
    ]
    assert [tuple(part.tolist() for part in dataset.document(i)) for i in range(3)] == expected
    assert dataset.document_lengths.tolist() == [len(ids) for ids, _ in expected]
    assert dataset.eos_token_id == eos
    assert dataset.tokens.dtype == np.uint16

    manifest = dataset.manifest
    assert (manifest.documents, manifest.tokens) == (3, sum(len(ids) for ids, _ in expected))
    assert manifest.loss_tokens == sum(sum(mask) for _, mask in expected)
    assert manifest.text_bytes == len(RECORDS[0]["text"].encode()) + len(" 2") + len("x")
    assert manifest.skipped == {"empty text": 1}
    assert manifest.tokenizer == tokenizer.fingerprint


def test_the_layout_is_megatrons(small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    dataset = prepare([write_jsonl({"text": "ab"}, {"text": "c"})], small_tokenizer, tmp_path / "tokens")
    first, second = ([*small_tokenizer.encode(t), small_tokenizer.eos_token_id] for t in ("ab", "c"))
    n, m = len(first), len(second)
    assert (tmp_path / "tokens/tokens.bin").read_bytes() == struct.pack(f"<{n + m}H", *first, *second)
    assert (tmp_path / "tokens/tokens.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)  # version
        + struct.pack("<B", 8)  # uint16
        + struct.pack("<Q", 2)  # sequences
        + struct.pack("<Q", 3)  # document indices
        + struct.pack("<2i", n, m)
        + struct.pack("<2q", 0, 2 * n)
        + struct.pack("<3q", 0, 1, 2)
    )
    # no mask where every token carries loss
    assert sorted(p.name for p in dataset.folder.iterdir()) == ["manifest.json", "tokens.bin", "tokens.idx"]
    assert dataset.mask is None
    assert dataset.document(1)[1].tolist() == [1] * m


def test_large_vocabularies_take_int32(trained_folder: Path, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    values = json.loads((trained_folder / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"word{i}": 400 + i for i in range(65500 - 400)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    dataset = prepare([write_jsonl({"text": "ab"})], Tokenizer.load(tmp_path), tmp_path / "tokens")
    assert dataset.tokens.dtype == np.int32
    assert dataset.tokens.tolist()[-1] == Tokenizer.load(tmp_path).eos_token_id


def test_made_once(prepared: TokenDataset, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, output = tmp_path / "data.jsonl", tmp_path / "tokens"
    before = (output / "manifest.json").stat()
    again = prepare([source], small_tokenizer, output, on_progress=lambda *_: pytest.fail("it was prepared twice"))
    assert again.manifest == prepared.manifest
    assert (output / "manifest.json").stat() == before

    os.utime(source, ns=(0, 0))
    with pytest.raises(UserError, match="prepared from other source files; use another --output or --overwrite"):
        prepare([source], small_tokenizer, output)
    assert prepare([source], small_tokenizer, output, overwrite=True).manifest.sources[0].mtime_ns == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "tokens"]


def test_another_tokenizer(prepared: TokenDataset, trained_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((trained_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    with pytest.raises(UserError, match="prepared from another tokenizer"):
        prepare([tmp_path / "data.jsonl"], Tokenizer.load(folder), prepared.folder)


def test_other_peoples_folders_are_left_alone(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_jsonl(*RECORDS)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that are not a prepared dataset; use another --output"):
            prepare([source], small_tokenizer, tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="is a file; --output names a folder"):
        prepare([source], small_tokenizer, source)
    assert source.is_file()
    (tmp_path / "empty").mkdir()
    assert prepare([source], small_tokenizer, tmp_path / "empty").manifest.documents == 3


def test_a_failed_run_leaves_nothing(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tokens.partial").mkdir()  # of a run that was killed
    with pytest.raises(UserError, match=r"data\.jsonl:2: a JSON list"):
        prepare([write_jsonl({"text": "a"}, [])], small_tokenizer, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"no documents with text in .*data\.jsonl \(2 skipped as empty\)"):
        prepare([write_jsonl({"text": ""}, {"text": ""})], small_tokenizer, tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert not is_dataset(tmp_path / "tokens")


def test_batches_and_progress(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small limits: many batches, documents that span them, the same tokens."""
    records = [
        {"prompt": f"question {i} " * i, "completion": "and the answer,\n it is " * (2 * i + 1)} for i in range(12)
    ]
    source = write_jsonl(*records)
    whole = prepare([source], small_tokenizer, tmp_path / "whole")
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 30)
    calls: list[tuple[int, int]] = []
    parts = prepare([source], small_tokenizer, tmp_path / "parts", on_progress=lambda *call: calls.append(call))
    assert parts.manifest == whole.manifest
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.mask is not None
    assert whole.mask is not None
    assert parts.mask.tolist() == whole.mask.tolist()
    assert len(calls) > 12
    assert calls == sorted(calls)
    assert calls[-1] == (source.stat().st_size, source.stat().st_size)


@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from(" \n\t\r'sa1.\u3000\x1c_"), st.characters(exclude_categories=["Cs"]))
    ),
    size=st.integers(1, 8),
)
@settings(max_examples=200, deadline=None)
def test_parts_have_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    parts = list(split_text(text, size))
    assert "".join(parts) == text
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_check_ids(prepared: TokenDataset, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCAN_TOKENS", 3)
    prepared.check_ids(small_tokenizer.vocab_size)
    eos = small_tokenizer.eos_token_id
    with pytest.raises(UserError, match=rf"token id {eos} at document 0 is out of range .* vocabulary of {eos}; "):
        prepared.check_ids(eos)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "loss_mask.bin", "manifest.json"])
def test_truncated_and_missing_files(prepared: TokenDataset, name: str) -> None:
    path = prepared.folder / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{name}: .*; prepare the data again with --overwrite"):
        TokenDataset.open(prepared.folder)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=name):
        TokenDataset.open(prepared.folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        TokenDataset.open(prepared.folder)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0, "does not start with the header"),  # magic
        (9, "does not start with the header"),  # version
        (17, "does not start with the header"),  # dtype
        (18, "documents, the manifest 3"),  # sequences
        (34, "does not describe the manifest's"),  # first length
        (34 + 12 + 8, "does not describe the manifest's"),  # second pointer
    ],
)
def test_damaged_index(prepared: TokenDataset, offset: int, message: str) -> None:
    path = prepared.folder / "tokens.idx"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"tokens\.idx: .*{message}"):
        TokenDataset.open(prepared.folder)


def test_another_version(prepared: TokenDataset) -> None:
    path = prepared.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this program reads 1; prepare it again"):
        TokenDataset.open(prepared.folder)
