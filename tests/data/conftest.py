from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj_stream.data.tokenize import tokenize_files
from gptj_stream.data.tokenizer import Tokenizer, train_tokenizer
from gptj_stream.data.tokens import FORMAT_VERSION, Manifest, TokenDataset

EOS = 0


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer, learned from this project's own text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter([Path(__file__).read_text(), "héllo wörld 日本 🎉"]), 400, folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder() -> Path:
    folder = Path(__file__).parents[3] / "shared" / "gpt2-bpe"
    if not folder.is_dir():
        pytest.skip("the GPT-2 vocabulary is not here")
    return folder


@pytest.fixture(scope="session", params=["trained_folder", "gpt2_folder"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The small tokenizer, and GPT-2's own where that is at hand."""
    return Tokenizer.load(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def small_tokenizer(trained_folder: Path) -> Tokenizer:
    return Tokenizer.load(trained_folder)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prepared(small_tokenizer: Tokenizer, write_jsonl: Callable[..., Path], tmp_path: Path) -> TokenDataset:
    """Three documents, one of them with a prompt, made from `data.jsonl` into `tokens`."""
    source = write_jsonl({"text": "Once upon a time."}, {"prompt": "1+1=", "completion": "2"}, {"text": "x"})
    return tokenize_files([source], small_tokenizer, tmp_path / "tokens")


@pytest.fixture(scope="session")
def dataset_of() -> Callable[..., TokenDataset]:
    """A dataset from (prompt ids, completion ids) pairs; end of text, 0, is put after each."""

    def build(documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenDataset:
        ids = [np.array([*prompt, *completion, EOS], np.uint16) for prompt, completion in documents]
        mask = np.concatenate([[0] * len(prompt) + [1] * (len(completion) + 1) for prompt, completion in documents])
        lengths = np.array([len(document) for document in ids], np.int64)
        manifest = Manifest(FORMAT_VERSION, "", (), len(ids), int(lengths.sum()), int(mask.sum()), 0, {})
        return TokenDataset(
            Path("dataset"),
            manifest,
            np.concatenate(ids),
            None if mask.all() else mask.astype(np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]),
            lengths,
        )

    return build
