"""The job that turns text into token files, and the one that trains a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gptj_stream.data.sources import ReadStats, read_documents, source_files
from gptj_stream.data.tokenize import tokenize_files
from gptj_stream.data.tokenizer import Tokenizer, train_tokenizer
from gptj_stream.data.tokens import TokenDataset, is_dataset
from gptj_stream.errors import UserError
from gptj_stream.options import PrepareOptions, TokenizerOptions
from gptj_stream.report import Report


def prepare(options: PrepareOptions, report: Report | None = None) -> TokenDataset:
    """Tokenize once, into memory-mapped files.

    Raises:
        UserError: a bad source, no text in any, or an output folder that holds something else.
    """
    folder = options.tokenizer or options.model
    assert folder is not None, "PrepareOptions asks for one of the two"
    tokenizer = Tokenizer.load(folder)
    return _tokenize(options.data, tokenizer, options.output, report or Report(), overwrite=options.overwrite)


def open_data(
    data: Sequence[Path], tokenizer: Tokenizer, cache: Path, report: Report, *, reuse: bool = False
) -> TokenDataset:
    """The tokens of `data`: an already prepared folder as it is, anything else prepared into `cache`.

    Args:
        reuse: take what `cache` holds without a look at the sources, which may have moved on.

    Raises:
        UserError: as `prepare`, or a prepared folder made with another tokenizer.
    """
    if reuse and is_dataset(cache):
        data = (cache,)
    if not any(is_dataset(path) for path in data):
        dataset = _tokenize(data, tokenizer, cache, report)
        report.note(described(dataset))
        return dataset
    if len(data) > 1:
        raise UserError(f"{len(data)} data sources, one of them prepared: give one prepared folder, or files only")
    dataset = TokenDataset.open(data[0])
    if dataset.manifest.tokenizer != tokenizer.fingerprint:
        raise UserError(f"{data[0]}: prepared with another tokenizer than the model's; prepare it again")
    return dataset


def check_sources(data: Sequence[Path]) -> None:
    """See whether `open_data` will find its files, without reading them.

    Raises:
        UserError: a path that is missing, of an unsupported kind or empty.
    """
    if not any(is_dataset(path) for path in data):
        source_files(data)


def train_bpe(options: TokenizerOptions, report: Report | None = None) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the data's text.

    Raises:
        UserError: a bad source, no text, or an output folder that is in use.
    """
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output} is a file; --output names a folder")
    if options.output.is_dir() and any(options.output.iterdir()):
        raise UserError(f"{options.output}: holds files already; use another --output")
    report = report or Report()
    stats = ReadStats()
    total = sum(path.stat().st_size for path in source_files(options.data))
    with report.bar("read for the tokenizer", total) as advance:

        def texts() -> Iterator[str]:
            for document in read_documents(options.data, stats):
                yield "".join(text for text, _ in document.pieces)
                advance(stats.bytes_read, "then merging" if stats.bytes_read == total else "")

        train_tokenizer(texts(), options.vocab_size, options.output)
    return Tokenizer.load(options.output)


def _tokenize(
    data: Sequence[Path], tokenizer: Tokenizer, output: Path, report: Report, *, overwrite: bool = False
) -> TokenDataset:
    with report.bar(f"tokenize {output.name}", 1.0) as advance:
        return tokenize_files(
            data, tokenizer, output, lambda done, total: advance(done / max(1, total), ""), overwrite=overwrite
        )


def described(dataset: TokenDataset) -> str:
    """What a dataset holds, and what was left out of it, in one line."""
    manifest = dataset.manifest
    skipped = "".join(f", {count:,} skipped: {why}" for why, count in manifest.skipped.items() if count)
    return (
        f"{dataset.folder.name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.loss_tokens:,} of them learned{skipped}"
    )
