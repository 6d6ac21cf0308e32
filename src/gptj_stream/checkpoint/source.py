"""A checkpoint in any public format, as GPT-J tensors under Hugging Face's names. Opening reads headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from gptj_stream.checkpoint import codegen
from gptj_stream.checkpoint.archive import Unpacked, is_archive
from gptj_stream.checkpoint.mesh import find_configuration, find_shards, read_mesh
from gptj_stream.checkpoint.safetensors_file import read_safetensors_file
from gptj_stream.checkpoint.tensors import StoredTensor
from gptj_stream.checkpoint.torch_file import read_torch_file
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.files import read_json
from gptj_stream.layout import Layout
from gptj_stream.report import Report
from gptj_stream.store import Store

SAFETENSORS, PYTORCH = "model.safetensors", "pytorch_model.bin"
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# causal masks and the like, that older transformers saved beside the weights
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attn.causal_mask", ".attn.embed_positions")
_MESSAGE_NAMES = 3


@dataclass(frozen=True)
class _Opened:
    format: str
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    step: int | None = None
    scratch: object = field(default=None, repr=False)  # an unpacked archive, deleted with its last user


class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: what was opened.
        format: in words, such as "Hugging Face, PyTorch files".
        config: the model's shape.
        tensors: all of them by Hugging Face's names, those that are not part of the model as well.
        step: of the training run that it is from, where the format keeps it.
    """

    def __init__(self, path: Path, config_file: Path | None = None) -> None:
        """Open a folder, a file of weights, or an archive, whatever the content shows it to be.

        Args:
            config_file: a `config.json`, or mesh-transformer-jax's configuration; by default the one in the folder.

        Raises:
            UserError: nothing of a known format, another architecture, or files that are missing, damaged or disagree.
        """
        self.path = path
        opened = _open(path, config_file)
        self.format, self.config, self.step = opened.format, opened.config, opened.step
        self.tensors: Mapping[str, StoredTensor] = opened.tensors
        self._scratch = opened.scratch

    @property
    def folder(self) -> Path:
        """Where the files beside the weights are: the tokenizer's, the generation config."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds every weight as it is stored."""
        kinds = {each.dtype for name, each in self.tensors.items() if not is_buffer(name) and each.dtype in FLOATING}
        return reduce(torch.promote_types, kinds) if kinds else torch.float32

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def load(self, store: Store, report: Report) -> None:
        """Fill the store's weights, one layer at a time.

        Raises:
            UserError: a tensor is missing, unexpected, of another shape or not a number everywhere.
        """
        self.check(store.layouts)
        with report.bar(f"load {self.path.name}", len(store.layouts)) as advance:
            for layer, layout in enumerate(store.layouts):
                flat = torch.empty(layout.numel)
                self.read_layer(layout, flat)
                store.load(layer, flat)
                advance(layer + 1, "")

    def read_layer(self, layout: Layout, flat: Tensor) -> None:
        """Fill a layer's buffer, (numel,) of any floating dtype.

        Raises:
            UserError: values that are not finite, or a file that ends too early.
        """
        for slot, view in layout.views(flat):
            tensor = self.tensors[slot.name]
            for start, stop in tensor.steps():
                rows = tensor.read_rows(start, stop)
                if not torch.isfinite(rows).all():
                    raise UserError(f"{tensor.file}: {slot.name} holds values that are not finite; the file is damaged")
                view[start:stop] = rows

    def check(self, layouts: Iterable[Layout]) -> None:
        """Refuse a checkpoint that lacks a tensor of these layers, or has others, or misshapen ones.

        Raises:
            UserError: it does.
        """
        slots = {slot.name: slot for layout in layouts for slot in layout.slots}
        if missing := sorted(slots.keys() - self.tensors.keys()):
            raise UserError(f"{self.path}: {_listed(missing)} missing; the checkpoint is not whole")
        unexpected = sorted(name for name in self.tensors.keys() - slots.keys() if not is_buffer(name))
        if unexpected:
            raise UserError(f"{self.path}: {_listed(unexpected)} not part of the model that config.json describes")
        for name, slot in slots.items():
            tensor = self.tensors[name]
            if tensor.dtype not in FLOATING:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    f"{tensor.file}: {name} has dtype {kind}; weights are read in float32, float16, bfloat16 and "
                    "float64. A quantized checkpoint cannot be trained: start from the one that it was made of"
                )
            if tensor.shape != slot.shape:
                raise UserError(f"{tensor.file}: {name} has shape {tensor.shape}; config.json makes it {slot.shape}")


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that older files have beside the weights."""
    return name.endswith(_BUFFERS)


def _open(path: Path, config_file: Path | None) -> _Opened:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a checkpoint")
    if path.is_file():
        return _open_file(path, config_file)
    shards = None if (path / "config.json").is_file() else find_shards(path)
    return _open_mesh(shards, config_file) if shards else _open_huggingface(path, config_file)


def _open_file(path: Path, config_file: Path | None) -> _Opened:
    if is_archive(path):
        scratch = Unpacked(path)
        shards = find_shards(scratch.folder)
        if shards is None:
            raise UserError(f"{path}: an archive without shard_0; mesh-transformer-jax's checkpoints have one")
        inside = find_configuration(shards) or find_configuration(scratch.folder)
        opened = _open_mesh(shards, config_file or inside or find_configuration(path.parent))
        return _Opened(opened.format + " archive", opened.config, opened.tensors, opened.step, scratch)
    source = config_file or path.parent / "config.json"
    if not source.is_file():
        raise UserError(f"{path}: no config.json beside it; --config names one")
    read, format_name = _reader(path)
    return _gptj(f"Hugging Face, {format_name}", source, read(path))


def _open_mesh(folder: Path, config_file: Path | None) -> _Opened:
    mesh = read_mesh(folder, config_file)
    return _Opened("mesh-transformer-jax", mesh.config, mesh.tensors, mesh.step)


def _open_huggingface(folder: Path, config_file: Path | None) -> _Opened:
    source = config_file or folder / "config.json"
    if not source.is_file():
        if config_file:
            raise UserError(f"{config_file}: no such file; --config names a config.json")
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json, and no shard_0")
    tensors: dict[str, StoredTensor] = {}
    files = _weight_files(folder)
    format_name = ""
    for path in files:
        read, format_name = _reader(path)
        found = read(path)
        if twice := found.keys() & tensors.keys():
            name = min(twice)
            raise UserError(f"{path}: {name} is in {tensors[name].file.name} as well; the checkpoint is not sound")
        tensors |= found
    several = f" ({len(files)} files)" if len(files) > 1 else ""
    return _gptj(f"Hugging Face, {format_name}{several}", source, tensors)


def _gptj(format_name: str, config_file: Path, tensors: dict[str, StoredTensor]) -> _Opened:
    values = read_json(config_file)
    if values.get("model_type") == "codegen":
        values, tensors = codegen.gptj_config(values), codegen.gptj_tensors(tensors)
        format_name = f"{format_name}, CodeGen"
    config = ModelConfig.from_huggingface(values, str(config_file))
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if named.setdefault(_full_name(name), tensor) is not tensor:
            raise UserError(f"{tensor.file}: {name} is there with and without the transformer prefix")
    return _Opened(format_name, config, named)


def _full_name(name: str) -> str:
    """A bare model's names lack the prefix that a model with a head gives them."""
    return f"transformer.{name}" if re.match(r"(wte|h|ln_f)\.", name) else name


def _weight_files(folder: Path) -> list[Path]:
    for whole in (SAFETENSORS, PYTORCH):  # in the order in which transformers looks
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
                raise UserError(f"{index}: it has no weight_map from tensor names to file names")
            files = [folder / name for name in sorted(set(names.values()))]
            for path in files:
                if path.parent != folder or path.name in ("", "..", "."):
                    raise UserError(f"{index}: {path.name!r} is not the name of a file in this folder")
                if not path.is_file():
                    raise UserError(f"{path}: no such file; the index names it, so the checkpoint is not whole")
            return files
    raise UserError(f"{folder} has no {SAFETENSORS} or {PYTORCH}, nor an index of several such files")


def _reader(path: Path) -> tuple[Callable[[Path], dict[str, StoredTensor]], str]:
    with path.open("rb") as file:
        start = file.read(9)
    if start == b"version h":
        raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return read_safetensors_file, "safetensors"
    return read_torch_file, "PyTorch files"


def _listed(names: list[str]) -> str:
    more = len(names) - _MESSAGE_NAMES
    verb = f" and {more} more are" if more > 0 else (" are" if len(names) > 1 else " is")
    return ", ".join(names[:_MESSAGE_NAMES]) + verb


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """What a model made from it should say of its origin."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.files}
    origin = {"source": checkpoint.path.name, "format": checkpoint.format}
    if checkpoint.step is not None:
        origin["step"] = str(checkpoint.step)
    if len(sizes) <= _MESSAGE_NAMES:
        return origin | {f"read from {name}": f"{size:,} bytes" for name, size in sizes.items()}
    return origin | {"read from": f"{len(checkpoint.files)} files"}
