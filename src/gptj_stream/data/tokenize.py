"""Making tokens: the user's files, through the tokenizer, into a prepared folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptj_stream.data.sources import Document, ReadStats, read_documents, source_files
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.data.tokens import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    MASK,
    TOKENS,
    Manifest,
    SourceFile,
    TokenDataset,
    is_dataset,
    token_dtype,
    write_index,
)
from gptj_stream.errors import UserError
from gptj_stream.files import new_folder

_BATCH_CHARACTERS = 1 << 22  # bounds memory: the library keeps much more than the ids while it encodes
_CHUNK_CHARACTERS = 1 << 18  # one long text keeps all cores busy
_WORD_END = re.compile(r"\S(?=[ \n])")


def tokenize_files(
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
    if output.resolve() == Path.cwd():
        raise UserError(f"{output}: is the folder this runs in; --output names one that can be replaced")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output names a folder")
    if is_dataset(output) and not overwrite:
        manifest = Manifest.read(output / MANIFEST)
        if (manifest.sources, manifest.tokenizer) != (sources, tokenizer.fingerprint):
            cause = "another tokenizer" if manifest.sources == sources else "other source files"
            raise UserError(f"{output}: holds data prepared from {cause}; use another --output or --overwrite")
        return TokenDataset.open(output)
    if output.is_dir() and not is_dataset(output) and any(output.iterdir()):
        raise UserError(f"{output}: holds files that are not a prepared dataset; use another --output")

    with new_folder(output) as folder:
        _write_dataset(files, sources, tokenizer, folder, on_progress)
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
    dtype = token_dtype(tokenizer.vocab_size)
    stats = ReadStats()
    bytes_total = sum(source.size for source in sources)
    lengths: list[int] = []
    length = loss_tokens = text_bytes = 0
    with (folder / TOKENS).open("wb") as tokens_file, (folder / MASK).open("wb") as mask_file:
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
            tokens_file.write(np.array(ids, dtype).tobytes())
            mask_file.write(mask)
            if on_progress is not None:
                on_progress(stats.bytes_read, bytes_total)

    if not lengths:
        named = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
        raise UserError(
            f"no documents with text in {named} ({stats.skipped.total()} skipped as empty); name other files"
        )
    tokens = sum(lengths)
    if loss_tokens == tokens:
        (folder / MASK).unlink()
    write_index(folder / INDEX, dtype, lengths)
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
    manifest.write(folder / MANIFEST)


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
