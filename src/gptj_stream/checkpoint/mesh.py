"""mesh-transformer-jax checkpoints: what a step is cut into, and how a GPT-J is put together from it again.

    shard_0/0.npz .. 15.npz, shard_1/..., one folder a core of the model-parallel mesh

A shard's files hold the leaves of the training state in order, without their names: the pytree
{opt_state, params, step} flattened by sorted keys, a slim checkpoint's without opt_state. That list is cut into 16
pieces, the first ones one longer, and each piece saved with `numpy.savez`. (mesh_transformer/checkpoint.py,
transformer_shard.py and layers.py of github.com/kingoflolz/mesh-transformer-jax; to_hf_weights.py joins the shards.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptj_stream.checkpoint.tensors import StoredTensor, parts_of, read_exactly
from gptj_stream.checkpoint.zip_file import members
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.files import read_json

_PIECES = 16
_LEAVES_OF_A_BLOCK = 10
_LEAVES_OF_THE_ENDS = 6
_DTYPES = {"f4": torch.float32, "f2": torch.float16, "V2": torch.bfloat16, "i4": torch.int32}
_HEADER = 10  # an .npy file's magic, version and length of its description
_MOST_HEADER = 4096
_MOST_JSON = 1 << 20

# configs/6B_roto_256.json of that project
SIX_B: dict[str, Any] = {
    "layers": 28, "d_model": 4096, "n_heads": 16, "n_vocab": 50400, "norm": "layernorm", "pe": "rotary",
    "pe_rotary_dims": 64, "seq": 2048, "cores_per_replica": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Leaf:
    """An array of one shard."""

    file: Path
    member: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        numel = int(np.prod(self.shape, dtype=np.int64))
        return read_exactly(self.file, self.offset, numel, self.dtype).view(self.shape)


@dataclass(frozen=True)
class MeshCheckpoint:
    """A checkpoint's parts under Hugging Face's names."""

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    step: int


def find_shards(folder: Path) -> Path | None:
    """The folder with `shard_0`, which may be a `step_N` inside `folder`; None if there is none."""
    if (folder / "shard_0").is_dir():
        return folder
    steps = sorted(path for path in folder.glob("step_*") if (path / "shard_0").is_dir())
    if len(steps) > 1:
        raise UserError(f"{folder} holds {len(steps)} checkpoints; name one of them: {steps[-1]}")
    return steps[0] if steps else None


def read_mesh(folder: Path, config_file: Path | None) -> MeshCheckpoint:
    """Open the checkpoint in `folder`, which `find_shards` found. Reads headers alone.

    Args:
        config_file: that project's JSON configuration; by default the one beside the shards, or GPT-J-6B's.

    Raises:
        UserError: files that are missing, damaged or disagree with each other or with the configuration.
    """
    shards = [_leaves(folder / f"shard_{i}") for i in range(_count_shards(folder))]
    numbers = {len(shard) for shard in shards}
    if len(numbers) > 1:
        raise UserError(f"{folder}: its shards hold {' and '.join(map(str, sorted(numbers)))} arrays; they must agree")
    values, source = _configuration(folder, config_file)
    layers, count = _whole(values, "layers", source), numbers.pop()
    parameters = _LEAVES_OF_THE_ENDS + _LEAVES_OF_A_BLOCK * layers
    if count not in (parameters + 1, 3 * parameters + 3):
        raise UserError(
            f"{folder}: {count} arrays a shard; {layers} layers ({source}) make {parameters + 1}, or "
            f"{3 * parameters + 3} with the optimizer's state"
        )
    config = _model_config(values, source, [shard[-1 - parameters] for shard in shards], len(shards))
    steps = {shard[-1].shape for shard in shards} | {shard[-1].dtype for shard in shards}
    if steps != {(), torch.int32}:
        raise UserError(f"{folder}: the last array of a shard is not the step, an int32")
    # sorted by name: the embedding, the layers as strings, the projection; opt_state before all, the step behind
    leaves = [shard[-1 - parameters : -1] for shard in shards]
    return MeshCheckpoint(config, _named(leaves, config), int(shards[0][-1].read()))


def _count_shards(folder: Path) -> int:
    numbers = {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"shard_(\d{1,4})", path.name))}
    if missing := set(range(max(numbers))) - numbers:
        raise UserError(f"{folder}: shard_{min(missing)} is missing; the checkpoint is not whole")
    return len(numbers)


def _leaves(shard: Path) -> list[Leaf]:
    """A shard's arrays in the order of the pytree."""
    pieces = []
    for number in range(_PIECES):
        path = shard / f"{number}.npz"
        if not path.is_file():
            raise UserError(f"{path}: no such file; the checkpoint is not whole")
        found = members(path)
        pieces.append([_leaf(path, f"arr_{i}.npy", found) for i in range(len(found))])
    sizes = [len(piece) for piece in pieces]
    short, longer = divmod(sum(sizes), _PIECES)
    if sizes != [short + 1] * longer + [short] * (_PIECES - longer):
        raise UserError(f"{shard}: its files hold {sizes} arrays, which is not how one list of them is cut")
    return [leaf for piece in pieces for leaf in piece]


def _leaf(path: Path, name: str, found: Mapping[str, Any]) -> Leaf:
    if name not in found:
        raise UserError(f"{path}: {name} is missing; the file is damaged")
    offset, nbytes = found[name]
    start = bytes(read_exactly(path, offset, min(nbytes, _HEADER), torch.uint8).tolist())
    length = int.from_bytes(start[8:10], "little")
    if start[:8] != b"\x93NUMPY\x01\x00" or length > _MOST_HEADER or _HEADER + length > nbytes:
        raise UserError(f"{path}: {name} is no NumPy array of version 1; the file is damaged")
    text = bytes(read_exactly(path, offset + _HEADER, length, torch.uint8).tolist()).decode("latin-1")
    match = re.fullmatch(
        r"\{'descr': '[<|](..)', 'fortran_order': False, 'shape': \(((?:\d{1,12}(?:, \d{1,12}){0,7})?),?\), \} *\n",
        text,
    )
    if not match or match[1] not in _DTYPES:
        raise UserError(f"{path}: {name} is {text.strip()[:80]}; only C-ordered {', '.join(_DTYPES)} are read")
    shape = tuple(int(number) for number in re.findall(r"\d+", match[2]))
    leaf = Leaf(path, name, offset + _HEADER + length, shape, _DTYPES[match[1]])
    numel = 1
    for size in shape:
        numel *= size
    if numel * leaf.dtype.itemsize != nbytes - _HEADER - length:
        raise UserError(f"{path}: {name} of shape {shape} does not have the size of its data; the file is damaged")
    return leaf


def _configuration(folder: Path, config_file: Path | None) -> tuple[dict[str, Any], str]:
    if config_file:
        return read_json(config_file), str(config_file)
    for beside in (folder, folder.parent):
        if path := find_configuration(beside):
            return read_json(path), str(path)
    return SIX_B, "GPT-J-6B's configuration, as no other is beside it; --config names one"


def find_configuration(folder: Path) -> Path | None:
    """The JSON configuration in `folder`; other JSON is passed over.

    Raises:
        UserError: several that are not the same.
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        with suppress(UserError):
            values = read_json(path) if path.stat().st_size < _MOST_JSON else {}
            if "d_model" in values and "layers" in values:
                found[path] = values
    if any(values != next(iter(found.values())) for values in found.values()):
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} has several configurations ({names}); name one with --config")
    return next(iter(found), None)


def _whole(values: Mapping[str, Any], name: str, source: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 < value < 1 << 24:
        raise UserError(f"{source}: {name} is {value!r}; it must be a positive number")
    return value


def _model_config(values: Mapping[str, Any], source: str, biases: Sequence[Leaf], shards: int) -> ModelConfig:
    """Raises:
    UserError: the configuration is not a GPT-J's, or not of these shards.
    """
    for name, only in (("pe", "rotary"), ("norm", "layernorm")):
        if values.get(name, only) != only:
            raise UserError(f"{source}: {name} is {values[name]!r}; GPT-J has {only!r}")
    if values.get("cores_per_replica", shards) != shards:
        raise UserError(f"{source}: cores_per_replica is {values['cores_per_replica']}; there are {shards} shards")
    width, heads, vocabulary = (_whole(values, name, source) for name in ("d_model", "n_heads", "n_vocab"))
    if biases[0].shape != (width,):
        raise UserError(f"{source}: d_model is {width}; {biases[0].file} has an embedding bias of {biases[0].shape}")
    if heads % shards or vocabulary % shards:
        raise UserError(f"{source}: n_heads {heads} and n_vocab {vocabulary} must be multiples of {shards} shards")
    end_of_text = 50256 if vocabulary > 50256 else None
    shape = {
        "n_layer": values["layers"], "n_embd": width, "n_head": heads, "vocab_size": vocabulary,
        "rotary_dim": values.get("pe_rotary_dims", width // heads), "n_positions": values.get("seq", 2048),
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }  # fmt: skip
    return ModelConfig.from_huggingface({"model_type": "gptj"} | shape, source)


def _named(shards: Sequence[Sequence[Leaf]], config: ModelConfig) -> dict[str, StoredTensor]:
    """Every parameter by Hugging Face's name."""
    arrays = iter(zip(*shards, strict=True))  # each: one leaf of every shard
    tensors: dict[str, StoredTensor] = {}
    d, v, f = config.n_embd, config.vocab_size, config.inner_dim

    def take(shape: tuple[int, ...], what: str) -> tuple[Leaf, ...]:
        leaves = next(arrays)
        for leaf in leaves:
            if leaf.shape != shape or leaf.dtype == torch.int32:
                raise UserError(f"{leaf.file}: {leaf.member}, {what}, has shape {leaf.shape}; it must be {shape}")
        return leaves

    n = len(shards)
    if f % n:
        raise UserError(f"the feed-forward's width {f} is not a multiple of {n} shards")
    bias = take((d,), "the embedding's bias")
    tensors["transformer.wte.weight"] = _embedding(take((v // n, d), "the embedding"), bias)
    for layer in sorted(range(config.n_layer), key=str):
        block = f"transformer.h.{layer}."
        for name in ("attn.q_proj", "attn.v_proj", "attn.k_proj"):  # linear, linear_1, linear_2
            tensors[f"{block}{name}.weight"] = _outputs(take((d, d // n), block + name))
        tensors[f"{block}attn.out_proj.weight"] = _inputs(take((d // n, d), f"{block}attn.out_proj"))
        tensors[f"{block}mlp.fc_in.bias"] = _joined(take((f // n,), f"{block}mlp.fc_in.bias"))
        tensors[f"{block}mlp.fc_in.weight"] = _outputs(take((d, f // n), f"{block}mlp.fc_in"))
        tensors[f"{block}mlp.fc_out.bias"] = _summed(take((d,), f"{block}mlp.fc_out.bias"))
        tensors[f"{block}mlp.fc_out.weight"] = _inputs(take((f // n, d), f"{block}mlp.fc_out"))
        for name in ("bias", "weight"):  # offset, scale
            tensors[f"{block}ln_1.{name}"] = _first(take((d,), f"{block}ln_1.{name}"))
    tensors["lm_head.bias"] = _joined(take((v // n,), "lm_head.bias"))
    tensors["lm_head.weight"] = _outputs(take((d, v // n), "lm_head"))
    for name in ("bias", "weight"):
        tensors[f"transformer.ln_f.{name}"] = _first(take((d,), f"transformer.ln_f.{name}"))
    return tensors


def _stored(
    leaves: Sequence[Leaf], shape: tuple[int, ...], read_rows: Callable[[int, int], Tensor], rows_at_once: int = 0
) -> StoredTensor:
    return StoredTensor(leaves[0].file, shape, leaves[0].dtype, read_rows, rows_at_once)


def _joined(leaves: Sequence[Leaf]) -> StoredTensor:
    """A vector cut over the shards."""
    whole = len(leaves) * leaves[0].shape[0]
    return _stored(leaves, (whole,), lambda start, stop: torch.cat([leaf.read() for leaf in leaves])[start:stop])


def _first(leaves: Sequence[Leaf]) -> StoredTensor:
    """A norm's vector: every shard has one, and the model reads the first shard's."""
    return _stored(leaves, leaves[0].shape, lambda start, stop: leaves[0].read()[start:stop])


def _sum(leaves: Sequence[Leaf]) -> Tensor:
    """In fp32: the sum over shards is made in the model, in what it computes in; bf16 would lose 1e-3 of the logits."""
    return torch.stack([leaf.read().float() for leaf in leaves]).sum(0)


def _summed(leaves: Sequence[Leaf]) -> StoredTensor:
    """A bias that every shard adds its own of before the sum over shards."""
    return _stored(leaves, leaves[0].shape, lambda start, stop: _sum(leaves)[start:stop])


def _outputs(leaves: Sequence[Leaf]) -> StoredTensor:
    """(in, out) matrices cut over their outputs, as (out, in)."""
    inputs, outputs = leaves[0].shape

    def read_rows(start: int, stop: int) -> Tensor:
        return torch.cat([leaves[shard].read().T[a:b] for shard, a, b in parts_of(outputs, start, stop)])

    return _stored(leaves, (len(leaves) * outputs, inputs), read_rows, rows_at_once=outputs)


def _inputs(leaves: Sequence[Leaf]) -> StoredTensor:
    """(in, out) matrices cut over their inputs, as (out, in)."""
    inputs, outputs = leaves[0].shape

    def read_rows(start: int, stop: int) -> Tensor:
        rows = torch.empty(stop - start, len(leaves) * inputs, dtype=leaves[0].dtype)
        for leaf, columns in zip(leaves, rows.split(inputs, dim=1), strict=True):
            columns.copy_(leaf.read()[:, start:stop].T)
        return rows

    return _stored(leaves, (outputs, len(leaves) * inputs), read_rows, rows_at_once=outputs)


def _embedding(leaves: Sequence[Leaf], biases: Sequence[Leaf]) -> StoredTensor:
    """The rows of all shards, to each of which the sum of all shards' biases is added."""
    rows, width = leaves[0].shape

    def read_rows(start: int, stop: int) -> Tensor:
        parts = [leaves[shard].read()[a:b] for shard, a, b in parts_of(rows, start, stop)]
        return torch.cat(parts).float() + _sum(biases)

    return _stored(leaves, (len(leaves) * rows, width), read_rows, rows_at_once=rows)
