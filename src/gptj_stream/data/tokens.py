"""Tokens on disk: made once, memory-mapped ever after.

A prepared folder holds `tokens.bin` and `tokens.idx` in the layout of Megatron-LM's indexed datasets (one sequence a
document), `loss_mask.bin` where some token carries no loss, and `manifest.json`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptj_stream.errors import UserError
from gptj_stream.files import read_json

FORMAT_VERSION = 1

TOKENS, INDEX, MASK, MANIFEST = "tokens.bin", "tokens.idx", "loss_mask.bin", "manifest.json"

# Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, dtype code, sequences, document indices.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # the two of its codes that hold our ids
_LARGEST_UINT16_VOCABULARY = 65500  # Megatron-LM's own limit
_LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32

_SCAN_TOKENS = 1 << 24


@dataclass(frozen=True)
class SourceFile:
    """What tells whether a source is still the one that was read."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        stat = path.stat()
        return cls(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder was made from and what it holds.

    Attributes:
        tokenizer: the tokenizer's fingerprint.
        loss_tokens: how many of `tokens` are learned, ends of text included.
        text_bytes: UTF-8 bytes of the text that carries loss.
        skipped: documents left out, by reason.
    """

    format_version: int
    tokenizer: str
    sources: tuple[SourceFile, ...]
    documents: int
    tokens: int
    loss_tokens: int
    text_bytes: int
    skipped: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """A prepared folder's manifest.

        Raises:
            UserError: missing, malformed or of another format version.
        """
        try:
            values = read_json(path)
            version = values["format_version"]
            if version == FORMAT_VERSION:
                return cls(**{**values, "sources": tuple(SourceFile(**source) for source in values["sources"])})
        except (UserError, TypeError, KeyError):
            raise _damaged(path, "is missing or malformed") from None
        raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; prepare it again")

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class TokenDataset:
    """N tokens of D documents, each ended by the end-of-text token.

    Attributes:
        tokens: (N,) uint16 or int32, memory-mapped.
        mask: (N,) uint8, 1 where the token carries loss; None where every token does.
        offsets: (D + 1,) int64, where each document starts in `tokens`; the last is N.
        document_lengths: (D,) int64.
    """

    folder: Path
    manifest: Manifest
    tokens: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8] | None
    offsets: npt.NDArray[np.int64]
    document_lengths: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> TokenDataset:
        """Map a prepared folder.

        Raises:
            UserError: a file is missing, truncated or does not agree with the manifest.
        """
        manifest = Manifest.read(folder / MANIFEST)
        dtype, lengths = _read_index(folder / INDEX, manifest)
        mask = None
        if manifest.loss_tokens < manifest.tokens:
            mask = _map(folder / MASK, np.dtype(np.uint8), manifest.tokens)
        return cls(
            folder,
            manifest,
            _map(folder / TOKENS, dtype, manifest.tokens),
            mask,
            _offsets(lengths),
            lengths,
        )

    @property
    def eos_token_id(self) -> int:
        return int(self.tokens[-1])

    def check_ids(self, vocab_size: int) -> None:
        """Read every token once and compare it with the model's vocabulary.

        Raises:
            UserError: an id the model has no row for.
        """
        for start in range(0, len(self.tokens), _SCAN_TOKENS):
            block = self.tokens[start : start + _SCAN_TOKENS]
            outside = (block < 0) | (block >= vocab_size)
            if outside.any():
                first = int(outside.argmax())
                document = int(np.searchsorted(self.offsets, start + first, side="right")) - 1
                raise UserError(
                    f"{self.folder}: token id {block[first]} at document {document} is out of range of the model's "
                    f"vocabulary of {vocab_size}; prepare the data with the model's own tokenizer"
                )


def is_dataset(folder: Path) -> bool:
    """Whether `folder` looks like a prepared one; `TokenDataset.open` checks what it holds."""
    return (folder / MANIFEST).is_file() and (folder / INDEX).is_file()


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smaller of the format's two dtypes, where it holds every id."""
    return _DTYPES[8 if vocab_size < _LARGEST_UINT16_VOCABULARY else 4]


def write_index(path: Path, dtype: np.dtype[Any], lengths: Sequence[int]) -> None:
    """Write the index of one or more documents of these `lengths`, whose tokens are of `dtype`.

    Raises:
        UserError: a document longer than the format holds.
    """
    if max(lengths) > _LONGEST_DOCUMENT:
        raise UserError(f"a document has {max(lengths)} tokens, the format holds {_LONGEST_DOCUMENT}; split its file")
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(documents)))
        file.write(np.array(lengths, "<i4").tobytes())
        file.write((_offsets(np.array(lengths, np.int64))[:-1] * dtype.itemsize).astype("<i8").tobytes())
        file.write(documents.tobytes())


def _read_index(path: Path, manifest: Manifest) -> tuple[np.dtype[Any], npt.NDArray[np.int64]]:
    """The tokens' dtype and the (D,) document lengths, checked against each other and the manifest."""
    if not path.is_file():
        raise _damaged(path, "is missing")
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise _damaged(path, f"has {len(data)} bytes, its header {_HEADER.size}")
    magic, version, code, sequences, documents = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise _damaged(path, "does not start with the header of an indexed dataset of uint16 or int32")
    if (sequences, documents) != (manifest.documents, manifest.documents + 1):
        raise _damaged(path, f"has {sequences} documents, the manifest {manifest.documents}")
    size = _HEADER.size + 12 * sequences + 8 * documents
    if len(data) != size:
        raise _damaged(path, f"has {len(data)} bytes instead of {size}")
    dtype = _DTYPES[code]
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    offsets = _offsets(lengths)
    if (lengths < 1).any() or offsets[-1] != manifest.tokens or (pointers != offsets[:-1] * dtype.itemsize).any():
        raise _damaged(path, f"does not describe the manifest's {manifest.tokens} tokens")
    return dtype, lengths


def _offsets(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)])


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        raise _damaged(path, "is missing" if size is None else f"has {size} bytes instead of {count * dtype.itemsize}")
    return np.memmap(path, dtype, mode="r")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; prepare the data again with --overwrite")
