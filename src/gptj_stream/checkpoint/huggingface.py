"""Hugging Face checkpoint folders: `config.json`, safetensors in one file or in shards, generation config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.files import new_folder, read_json
from gptj_stream.layout import Layout, Slot
from gptj_stream.report import Report
from gptj_stream.store import Store

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_TAGS = {dtype: tag for tag, dtype in _DTYPES.items()}
_OLD_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that older transformers saved beside the weights


class _Entry(NamedTuple):
    """A tensor as its file's header has it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class HuggingFaceFolder:
    """An open checkpoint. Opening reads headers alone and refuses a folder that does not hold a whole GPT-J.

    Attributes:
        config: the model's shape.
        dtype: what the weights are stored in.
    """

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            UserError: not a checkpoint folder, another architecture, or files that are missing, damaged or disagree.
        """
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give a checkpoint folder in Hugging Face layout")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a checkpoint folder: it has no config.json")
        self.config = ModelConfig.from_huggingface(read_json(folder / "config.json"), str(folder / "config.json"))
        self._entries: dict[str, _Entry] = {}
        for path in self._weight_files():
            with _open(path) as file:
                for name in file.keys():  # noqa: SIM118
                    there = file.get_slice(name)
                    self._entries[name] = _Entry(path, tuple(there.get_shape()), there.get_dtype())
        self.dtype = self._dtype("lm_head.weight") if "lm_head.weight" in self._entries else torch.float32

    def load(self, store: Store, report: Report) -> None:
        """Fill the store's weights, one tensor at a time.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape or not a number everywhere.
        """
        self.check_names(store.layouts)
        with report.bar(f"load {self.folder.name}", len(store.layouts)) as advance:
            for layer, layout in enumerate(store.layouts):
                flat = torch.empty(layout.numel)
                self.read_layer(layout, flat)
                store.load(layer, flat)
                advance(layer + 1, "")

    def read_layer(self, layout: Layout, flat: Tensor) -> None:
        """Fill a layer's buffer, (numel,) of any floating dtype."""
        for slot, view in layout.views(flat):
            view.copy_(self.read(slot))

    def read(self, slot: Slot) -> Tensor:
        """One tensor as it is stored."""
        path, shape, _ = self._entries[slot.name]
        if shape != slot.shape:
            raise UserError(f"{path}: {slot.name} has shape {shape}; config.json makes it {slot.shape}")
        self._dtype(slot.name)
        # closed again: the pages of an open file that were read count as this process's memory
        with _open(path) as file:
            tensor: Tensor = file.get_tensor(slot.name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {slot.name} holds values that are not finite; the file is damaged")
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        path, _, tag = self._entries[name]
        if tag not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {tag}; only {', '.join(_DTYPES)} can be read")
        return _DTYPES[tag]

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f"{index}: it has no weight_map from tensor names to file names")
            return [self.folder / name for name in sorted(set(names.values()))]
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        found = sorted(path.name for path in self.folder.glob("*.bin"))
        has = f"has {', '.join(found[:3])} but no" if found else "has no"
        raise UserError(f"{self.folder} {has} {WEIGHTS} or {INDEX}; save the model as safetensors first")

    def check_names(self, layouts: Iterable[Layout]) -> None:
        """Refuse a checkpoint that lacks a tensor of these layers, or has others.

        Raises:
            UserError: it does.
        """
        expected = {slot.name for layout in layouts for slot in layout.slots}
        if missing := sorted(expected - self._entries.keys()):
            raise UserError(f"{self.folder}: {_listed(missing)} missing; the checkpoint is not whole")
        unexpected = sorted(name for name in self._entries.keys() - expected if not name.endswith(_OLD_BUFFERS))
        if unexpected:
            raise UserError(f"{self.folder}: {_listed(unexpected)} not part of the model that config.json describes")


def write_folder(
    folder: Path,
    config: ModelConfig,
    store: Store,
    *,
    dtype: torch.dtype,
    carried_files: Iterable[Path] = (),
    source: Path | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write the store's weights as a folder that transformers loads; it appears whole or not at all.

    Args:
        dtype: of the weights on disk.
        carried_files: the tokenizer's, to copy.
        source: checkpoint folder whose `generation_config.json` to carry over.
        max_shard_size: bytes of a weight file; a larger model is written as several, with an index.

    Raises:
        UserError: a weight beyond the range of `dtype`.
    """
    with new_folder(folder) as temporary:
        _write_weights(temporary, store, dtype, max_shard_size)
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


def _write_weights(folder: Path, store: Store, dtype: torch.dtype, max_shard_size: int) -> None:
    shards: list[list[tuple[int, Slot]]] = [[]]
    size = 0
    for layer, layout in enumerate(store.layouts):
        for slot in layout.slots:
            nbytes = slot.numel * dtype.itemsize
            if shards[-1] and size + nbytes > max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append((layer, slot))
            size += nbytes
    if len(shards) == 1:
        files = [WEIGHTS]
    else:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {slot.name: file for file, shard in zip(files, shards, strict=True) for _, slot in shard}
        total = sum(layout.numel for layout in store.layouts) * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            _write_safetensors(out, [slot for _, slot in shard], dtype, _tensors(store, shard))


def _tensors(store: Store, shard: list[tuple[int, Slot]]) -> Iterator[Tensor]:
    for layer, slots in groupby(shard, key=lambda item: item[0]):
        weights = store.weights(layer)
        for _, slot in slots:
            yield slot.view(weights)


def _write_safetensors(out: BinaryIO, slots: list[Slot], dtype: torch.dtype, tensors: Iterator[Tensor]) -> None:
    """The safetensors format, one tensor in memory at a time (the library's own writer wants them all).

    8 bytes of header length, a JSON header padded with spaces to a multiple of 8, the tensors end to end.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the "format"
    end = 0
    for slot in slots:
        start, end = end, end + slot.numel * dtype.itemsize
        header[slot.name] = {"dtype": _TAGS[dtype], "shape": slot.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for slot, tensor in zip(slots, tensors, strict=True):
        stored = tensor.detach().to("cpu", dtype)
        if not torch.isfinite(stored).all():
            raise UserError(f"{slot.name} holds values that {_TAGS[dtype]} cannot; use another --save-dtype")
        out.write(stored.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the index names it, so the checkpoint is not whole") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not safetensors: {error}") from None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more are" if len(names) > 3 else (" are" if len(names) > 1 else " is")
    return ", ".join(names[:3]) + more
