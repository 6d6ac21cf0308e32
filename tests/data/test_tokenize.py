from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_stream.data import tokenize as module
from gptj_stream.data.tokenize import split_text, tokenize_files
from gptj_stream.data.tokenizer import END_OF_TEXT, Tokenizer
from gptj_stream.data.tokens import TokenDataset, is_dataset
from gptj_stream.errors import UserError

RECORDS = (
    {"text": "Once upon a time <|endoftext|> there was 日本."},
    {"prompt": "Q: 1+1?\nA:", "completion": " 2"},
    {"text": ""},
    {"prompt": "", "completion": "x"},
)


def test_documents_come_back(tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    dataset = tokenize_files([write_jsonl(*RECORDS)], tokenizer, tmp_path / "tokens")
    eos = tokenizer.eos_token_id
    story, prompt, completion = (
        tokenizer.encode(t) for t in (RECORDS[0]["text"], RECORDS[1]["prompt"], RECORDS[1]["completion"])
    )
    expected = [
        ([*story, eos], [1] * (len(story) + 1)),
        ([*prompt, *completion, eos], [0] * len(prompt) + [1] * (len(completion) + 1)),
        ([*tokenizer.encode("x"), eos], [1, 1]),
    ]
    assert dataset.mask is not None
    assert dataset.tokens.tolist() == [token for ids, _ in expected for token in ids]
    assert dataset.mask.tolist() == [bit for _, mask in expected for bit in mask]
    assert dataset.document_lengths.tolist() == [len(ids) for ids, _ in expected]
    assert dataset.eos_token_id == eos
    assert dataset.tokens.dtype == np.uint16

    manifest = dataset.manifest
    assert (manifest.documents, manifest.tokens) == (3, sum(len(ids) for ids, _ in expected))
    assert manifest.loss_tokens == sum(sum(mask) for _, mask in expected)
    assert manifest.text_bytes == len(RECORDS[0]["text"].encode()) + len(" 2") + len("x")
    assert manifest.skipped == {"empty text": 1}
    assert manifest.tokenizer == tokenizer.fingerprint


def test_a_document_that_begins_with_a_control_token(
    tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    """It stays one document, and the model is never taught that text may end there."""
    records = ({"text": f"{END_OF_TEXT}a"}, {"prompt": f"{END_OF_TEXT}q", "completion": f"{END_OF_TEXT}{END_OF_TEXT}"})
    dataset = tokenize_files([write_jsonl(*records)], tokenizer, tmp_path / "tokens")
    assert dataset.manifest.documents == 2
    assert np.flatnonzero(dataset.tokens == tokenizer.eos_token_id).tolist() == (dataset.offsets[1:] - 1).tolist()
    for i, record in enumerate(records):
        ids = dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]]
        assert tokenizer.decode(ids[:-1].tolist()) == "".join(record.values())


def test_made_once(prepared: TokenDataset, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, output = tmp_path / "data.jsonl", tmp_path / "tokens"
    before = (output / "manifest.json").stat()
    again = tokenize_files(
        [source], small_tokenizer, output, on_progress=lambda *_: pytest.fail("it was prepared twice")
    )
    assert again.manifest == prepared.manifest
    assert (output / "manifest.json").stat() == before

    os.utime(source, ns=(0, 0))
    with pytest.raises(UserError, match="prepared from other source files; use another --output or --overwrite"):
        tokenize_files([source], small_tokenizer, output)
    assert tokenize_files([source], small_tokenizer, output, overwrite=True).manifest.sources[0].mtime_ns == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "tokens"]


def test_another_tokenizer(prepared: TokenDataset, trained_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((trained_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "A"}')
    with pytest.raises(UserError, match="prepared from another tokenizer"):
        tokenize_files([tmp_path / "data.jsonl"], Tokenizer.load(folder), prepared.folder)


def test_other_peoples_folders_are_left_alone(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_jsonl(*RECORDS)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds files that are not a prepared dataset; use another --output"):
            tokenize_files([source], small_tokenizer, tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="is a file; --output names a folder"):
        tokenize_files([source], small_tokenizer, source)
    assert source.is_file()
    (tmp_path / "empty").mkdir()
    assert tokenize_files([source], small_tokenizer, tmp_path / "empty").manifest.documents == 3


def test_a_failed_run_leaves_nothing(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / ".tokens.tmp").mkdir()  # of a run that was killed
    with pytest.raises(UserError, match=r"data\.jsonl:2: a JSON list"):
        tokenize_files([write_jsonl({"text": "a"}, [])], small_tokenizer, tmp_path / "tokens")
    with pytest.raises(UserError, match=r"no documents with text in .*data\.jsonl \(2 skipped as empty\)"):
        tokenize_files([write_jsonl({"text": ""}, {"text": ""})], small_tokenizer, tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert not is_dataset(tmp_path / "tokens")


def test_a_failed_run_keeps_what_was_there(
    prepared: TokenDataset, small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="a JSON list"):
        tokenize_files([write_jsonl([])], small_tokenizer, prepared.folder, overwrite=True)
    assert TokenDataset.open(prepared.folder).manifest == prepared.manifest


def test_batches_and_progress(
    small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small limits: many batches, documents that span them, the same tokens."""
    records = [
        {"prompt": f"question {i} " * i, "completion": "and the answer,\n it is " * (2 * i + 1)} for i in range(12)
    ]
    source = write_jsonl(*records)
    whole = tokenize_files([source], small_tokenizer, tmp_path / "whole")
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 30)
    calls: list[tuple[int, int]] = []
    parts = tokenize_files([source], small_tokenizer, tmp_path / "parts", on_progress=lambda *call: calls.append(call))
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
