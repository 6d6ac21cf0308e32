"""Tokens on disk: made once, memory-mapped ever after.

A prepared folder holds `tokens.bin` and `tokens.idx` in the layout of Megatron-LM's indexed datasets (one sequence a
document), `loss_mask.bin` where some token carries no loss, and `manifest.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from gptj_stream.data.sources import Document, ReadStats, read_documents, source_files
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError

FORMAT_VERSION = 1

_TOKENS, _INDEX, _MASK, _MANIFEST = "tokens.bin", "tokens.idx", "loss_mask.bin", "manifest.json"

# Megatron-LM, megatron/core/datasets/indexed_dataset.py: magic, version, dtype code, sequences, document indices.
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}  # the two of its codes that hold our ids
_LARGEST_UINT16_VOCABULARY = 65500  # Megatron-LM's own limit
_LONGEST_DOCUMENT = 2**31 - 1  # lengths are int32

_BATCH_CHARACTERS = 1 << 22  # bounds memory: the library needs about 100 bytes a token while it encodes
_CHUNK_CHARACTERS = 1 << 18  # one long text keeps all cores busy
_SCAN_TOKENS = 1 << 24
_WORD_END = re.compile(r"\S(?=[ \n])")


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
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if (version := values["format_version"]) != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {version}, this program reads {FORMAT_VERSION}; prepare it again"
                )
            return cls(**{**values, "sources": tuple(SourceFile(**source) for source in values["sources"])})
        except UserError:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            raise _damaged(path, "is missing or malformed") from None


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
        manifest = Manifest.read(folder / _MANIFEST)
        dtype, lengths = _read_index(folder / _INDEX, manifest)
        mask = None
        if manifest.loss_tokens < manifest.tokens:
            mask = _map(folder / _MASK, np.dtype(np.uint8), manifest.tokens)
        return cls(
            folder,
            manifest,
            _map(folder / _TOKENS, dtype, manifest.tokens),
            mask,
            _offsets(lengths),
            lengths,
        )

    @property
    def eos_token_id(self) -> int:
        return int(self.tokens[-1])

    def document(self, i: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """Document i's (n,) ids and (n,) loss mask."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        ids = self.tokens[span]
        return ids, np.ones(len(ids), np.uint8) if self.mask is None else self.mask[span]

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
    """Whether `folder` looks like one that `prepare` made; `TokenDataset.open` checks what it holds."""
    return (folder / _MANIFEST).is_file() and (folder / _INDEX).is_file()


def prepare(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    output: Path,
    on_progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> TokenDataset:
    """Tokenize `paths` into the folder `output`, or open what an earlier call made there from the same inputs.

    Pieces of a document are encoded separately, so a prompt ends exactly where its completion starts. The folder
    appears whole or not at all.

    Args:
        on_progress: called with (bytes done, bytes in all) of the source files.
        overwrite: replace a dataset in `output`, whatever it was made from.

    Raises:
        UserError: a bad source, no text in any of them, or an `output` that holds something else.
    """
    files = source_files(paths)
    sources = tuple(SourceFile.of(path) for path in files)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output names a folder")
    if is_dataset(output) and not overwrite:
        manifest = Manifest.read(output / _MANIFEST)
        if (manifest.sources, manifest.tokenizer) != (sources, tokenizer.fingerprint):
            cause = "another tokenizer" if manifest.sources == sources else "other source files"
            raise UserError(f"{output}: holds data prepared from {cause}; use another --output or --overwrite")
        return TokenDataset.open(output)
    if output.is_dir() and not is_dataset(output) and any(output.iterdir()):
        raise UserError(f"{output}: holds files that are not a prepared dataset; use another --output")

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        _write_dataset(files, sources, tokenizer, partial, on_progress)
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(output.parent)
    return TokenDataset.open(output)


class _Chunk(NamedTuple):
    text: str
    carries_loss: bool
    ends_document: bool


def _write_dataset(
    files: Sequence[Path],
    sources: tuple[SourceFile, ...],
    tokenizer: Tokenizer,
    folder: Path,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    code = 8 if tokenizer.vocab_size < _LARGEST_UINT16_VOCABULARY else 4
    stats = ReadStats()
    bytes_total = sum(source.size for source in sources)
    lengths: list[int] = []
    length = loss_tokens = text_bytes = 0
    with (folder / _TOKENS).open("wb") as tokens_file, (folder / _MASK).open("wb") as mask_file:
        for batch in _batches(_chunks(read_documents(files, stats))):
            ids: list[int] = []
            mask = bytearray()
            for chunk, chunk_ids in zip(batch, tokenizer.encode_batch([c.text for c in batch]), strict=True):
                ids += chunk_ids
                mask += bytes([chunk.carries_loss]) * len(chunk_ids)
                length += len(chunk_ids)
                text_bytes += len(chunk.text.encode()) if chunk.carries_loss else 0
                if chunk.ends_document:
                    ids.append(tokenizer.eos_token_id)
                    mask.append(True)
                    lengths.append(length + 1)
                    length = 0
            loss_tokens += sum(mask)
            tokens_file.write(np.array(ids, _DTYPES[code]).tobytes())
            mask_file.write(mask)
            if on_progress is not None:
                on_progress(stats.bytes_read, bytes_total)
        _sync(tokens_file)
        _sync(mask_file)

    if not lengths:
        named = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
        raise UserError(
            f"no documents with text in {named} ({stats.skipped.total()} skipped as empty); name other files"
        )
    if max(lengths) > _LONGEST_DOCUMENT:
        raise UserError(f"a document has {max(lengths)} tokens, the format holds {_LONGEST_DOCUMENT}; split its file")
    tokens = sum(lengths)
    if loss_tokens == tokens:
        (folder / _MASK).unlink()
    manifest = Manifest(
        FORMAT_VERSION,
        tokenizer.fingerprint,
        sources,
        len(lengths),
        tokens,
        loss_tokens,
        text_bytes,
        dict(stats.skipped),
    )
    _write_index(folder / _INDEX, code, lengths)
    with (folder / _MANIFEST).open("wb") as file:
        file.write(json.dumps(asdict(manifest), indent=2).encode() + b"\n")
        _sync(file)
    _sync_folder(folder)


def _chunks(documents: Iterable[Document]) -> Iterator[_Chunk]:
    for document in documents:
        parts = [(part, loss) for text, loss in document.pieces if text for part in split_text(text, _CHUNK_CHARACTERS)]
        for i, (part, loss) in enumerate(parts):
            yield _Chunk(part, loss, i == len(parts) - 1)


def split_text(text: str, size: int) -> Iterator[str]:
    """Cut a long text into parts of `size` characters or a little more, whose token ids join to those of the whole.

    GPT-2's splitting pattern never joins whitespace to the word before it, so before a space or a newline that
    follows anything else there is always a boundary. A text without one stays whole.
    """
    start = 0
    while len(text) - start > size:
        boundary = _WORD_END.search(text, start + size - 1)
        if boundary is None:
            break
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:]


def _batches(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    batch: list[_Chunk] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_index(path: Path, code: int, lengths: Sequence[int]) -> None:
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    item = _DTYPES[code].itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(documents)))
        file.write(np.array(lengths, "<i4").tobytes())
        file.write((_offsets(np.array(lengths, np.int64))[:-1] * item).astype("<i8").tobytes())
        file.write(documents.tobytes())
        _sync(file)


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


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
