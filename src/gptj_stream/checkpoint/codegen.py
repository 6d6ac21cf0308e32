"""CodeGen's blocks are GPT-J's but for one fused projection, which is cut up here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptj_stream.checkpoint.tensors import StoredTensor, parts_of
from gptj_stream.errors import UserError

_GROUPS = 4  # the cores that CodeGen was trained on: each has q, v and k of its heads in turn
_FUSED = "attn.qkv_proj.weight"


def gptj_config(values: dict[str, Any]) -> dict[str, Any]:
    """A CodeGen's `config.json` as a GPT-J's."""
    return values | {"model_type": "gptj"}


def gptj_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Its tensors under GPT-J's names, `qkv_proj` cut into `q_proj`, `k_proj` and `v_proj`.

    (transformers' modeling_codegen.py: the fused rows are `_GROUPS` groups, each q, v, k.)

    Raises:
        UserError: a fused projection that does not divide so.
    """
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_FUSED):
            renamed[name] = tensor
            continue
        if len(tensor.shape) != 2 or tensor.shape[0] % (3 * _GROUPS):
            raise UserError(f"{tensor.file}: {name} has shape {tensor.shape}; its rows must divide by {3 * _GROUPS}")
        for place, part in enumerate(("q_proj", "v_proj", "k_proj")):
            own = name.replace("qkv_proj", part)
            if own in tensors:
                raise UserError(f"{tensor.file}: {own} is there beside {name}; a CodeGen has one of them")
            renamed[own] = _part(tensor, place)
    return renamed


def _part(fused: StoredTensor, place: int) -> StoredTensor:
    rows = fused.shape[0] // (3 * _GROUPS)

    def read_rows(start: int, stop: int) -> Tensor:
        offsets = [(3 * group + place) * rows for group in range(_GROUPS)]
        return torch.cat([fused.read_rows(offsets[i] + a, offsets[i] + b) for i, a, b in parts_of(rows, start, stop)])

    shape = (rows * _GROUPS, fused.shape[1])
    return StoredTensor(fused.file, shape, fused.dtype, read_rows, rows_at_once=rows)
