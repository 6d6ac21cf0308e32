"""Folders that transformers and CTranslate2 load as they are: config, safetensors in shards, tokenizer, card."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from gptj_stream.checkpoint.safetensors_file import write_safetensors
from gptj_stream.checkpoint.source import SAFETENSORS, Checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.files import new_folder
from gptj_stream.layout import Slot
from gptj_stream.report import Report
from gptj_stream.store import Store

INDEX = f"{SAFETENSORS}.index.json"
CARD = "README.md"
MAX_SHARD_SIZE = 5_000_000_000

Weights = Iterable[tuple[Slot, str, Iterable[Tensor]]]
"""Every parameter in the model's order, where it is from in words, and its rows in pieces."""


def stored_weights(store: Store) -> Iterator[tuple[Slot, str, Iterable[Tensor]]]:
    for layer, layout in enumerate(store.layouts):
        for slot, view in layout.views(store.weights(layer)):
            yield slot, "the model", (view,)


def checkpoint_weights(checkpoint: Checkpoint) -> Iterator[tuple[Slot, str, Iterable[Tensor]]]:
    for layout in model_layouts(checkpoint.config):
        for slot in layout.slots:
            tensor = checkpoint.tensors[slot.name]
            yield slot, str(tensor.file), (tensor.read_rows(start, stop) for start, stop in tensor.steps())


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: Weights,
    *,
    dtype: torch.dtype,
    carried_files: Iterable[Path] = (),
    source: Path | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    provenance: Mapping[str, str] | None = None,
    report: Report | None = None,
) -> None:
    """Write a model as a folder in Hugging Face layout; it appears whole or not at all.

    Args:
        dtype: of the weights on disk.
        carried_files: the tokenizer's, to copy.
        source: checkpoint folder whose `generation_config.json` to carry over.
        max_shard_size: bytes of a weight file; a larger model is written as several, with an index.
        provenance: what the model card says of the origin; without it no card is written.

    Raises:
        UserError: a weight beyond the range of `dtype`.
    """
    with new_folder(folder) as temporary:
        hashed = provenance is not None
        hashes = _write_weights(temporary, config, weights, dtype, max_shard_size, hashed, report or Report())
        values = config.to_huggingface() | {"dtype": str(dtype).removeprefix("torch.")}
        _write_json(temporary / "config.json", values)
        generation = source / "generation_config.json" if source else None
        if generation and generation.is_file():
            shutil.copyfile(generation, temporary / generation.name)
        else:
            tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
            _write_json(temporary / "generation_config.json", tokens)
        for path in carried_files:
            shutil.copyfile(path, temporary / path.name)
        if provenance is not None:
            (temporary / CARD).write_text(_card(folder.name, config, dtype, provenance, hashes), encoding="utf-8")


def _write_weights(
    folder: Path,
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    max_shard_size: int,
    hashed: bool,
    report: Report,
) -> dict[str, str]:
    """Write the weights' files and their index; if `hashed`, the SHA-256 of each file."""
    slots = [slot for layout in model_layouts(config) for slot in layout.slots]
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        nbytes = slot.numel * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += nbytes
    if len(shards) == 1:
        files = [SAFETENSORS]
    else:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {slot.name: file for file, shard in zip(files, shards, strict=True) for slot in shard}
        total = config.parameters * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    what = f"write {folder.name.removeprefix('.').removesuffix('.tmp')}"
    whole = config.parameters * dtype.itemsize
    done = 0
    hashes: dict[str, str] = {}
    rest = iter(weights)
    with report.bar(what, whole) as advance:

        def pieces(shard: list[Slot]) -> Iterator[Tensor]:
            nonlocal done
            for expected, (slot, origin, rows) in zip(shard, rest, strict=False):
                assert slot.name == expected.name, "the weights come in the model's order"
                for piece in rows:
                    yield _as_stored(f"{origin}: {slot.name}", piece, dtype)
                    done += piece.numel() * dtype.itemsize
                    advance(done, f"{done / 1e9:.1f} of {whole / 1e9:.1f} GB")

        for file, shard in zip(files, shards, strict=True):
            with (folder / file).open("wb") as out:
                if not hashed:
                    write_safetensors(out, shard, dtype, pieces(shard))
                    continue
                with _Hashing(out) as hashing:
                    write_safetensors(hashing, shard, dtype, pieces(shard))
                hashes[file] = hashing.digest
    return hashes


def _as_stored(name: str, piece: Tensor, dtype: torch.dtype) -> Tensor:
    stored = piece.detach().to("cpu", dtype)
    if not torch.isfinite(stored).all():
        if not torch.isfinite(piece).all():
            raise UserError(f"{name} holds values that are not finite; the weights are damaged")
        raise UserError(f"{name} holds values beyond {str(dtype).removeprefix('torch.')}'s range; use another dtype")
    return stored


class _Hashing:
    """A file that takes the SHA-256 of what is written to it, on a thread, since that takes longer than the writing."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._sha256 = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self.digest = ""

    def __enter__(self) -> Self:
        return self

    def write(self, data: Any, /) -> int:
        self._wait()
        self._pending = self._thread.submit(self._sha256.update, data)
        return self._out.write(data)

    def __exit__(self, *_: object) -> None:
        self._wait()
        self._thread.shutdown()
        self.digest = self._sha256.hexdigest()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()


def _card(
    name: str, config: ModelConfig, dtype: torch.dtype, provenance: Mapping[str, str], hashes: Mapping[str, str]
) -> str:
    """A stub of a model card, with what is known of the weights' origin."""
    origin = "\n".join(f"- {what}: {value}" for what, value in provenance.items())
    files = "\n".join(f"| {file} | `{digest}` |" for file, digest in hashes.items())
    kind = str(dtype).removeprefix("torch.")
    return f"""---
library_name: transformers
tags: [gptj]
---
# {name}

A GPT-J of {config.parameters:,} parameters ({config.n_layer} blocks of {config.n_embd}, {config.vocab_size} rows of
vocabulary), {kind}. What it was trained on and is for, its limits and its license are for its publisher to say here.

## Provenance

{origin}
- written by: gptj-stream {version("gptj-stream")}

| file | SHA-256 |
|---|---|
{files}
"""


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
