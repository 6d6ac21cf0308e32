from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptj_stream.data import tokens as module
from gptj_stream.data.tokenize import tokenize_files
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import TokenDataset, token_dtype, write_index
from gptj_stream.errors import UserError


def test_the_layout_is_megatrons(small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    dataset = tokenize_files([write_jsonl({"text": "ab"}, {"text": "c"})], small_tokenizer, tmp_path / "tokens")
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


def test_large_vocabularies_take_int32(trained_folder: Path, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    values = json.loads((trained_folder / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"word{i}": 400 + i for i in range(65500 - 400)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    dataset = tokenize_files([write_jsonl({"text": "ab"})], Tokenizer.load(tmp_path), tmp_path / "tokens")
    assert dataset.tokens.dtype == np.int32
    assert dataset.tokens.tolist()[-1] == Tokenizer.load(tmp_path).eos_token_id


def test_a_document_too_long_for_the_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a document has 2147483648 tokens, the format holds 2147483647; split its"):
        write_index(tmp_path / "tokens.idx", token_dtype(400), [5, 2**31])


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


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 1}', '{"format_version": 1, "sources": [3]}'])
def test_malformed_manifest(prepared: TokenDataset, content: str) -> None:
    (prepared.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: is missing or malformed; prepare the data again"):
        TokenDataset.open(prepared.folder)


def test_another_version(prepared: TokenDataset) -> None:
    path = prepared.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this program reads 1; prepare it again"):
        TokenDataset.open(prepared.folder)
