"""Checkpoints in other projects' formats, written from transformers' tiny models by those formats' own rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptj_stream.config import ModelConfig

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

Tree = dict[str, dict[str, np.ndarray]]


class Mesh:
    """A GPT-J cut up as mesh-transformer-jax keeps it: a shard's parameters by haiku's module names.

    Biases that the model sums over shards are made of random parts, and norms that it reads from the first shard alone
    are noise in the others.
    """

    def __init__(self, model: GPTJForCausalLM, config: ModelConfig, shards: int) -> None:
        self.config, self.count = config, shards
        self.random = np.random.default_rng(0)
        weights = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
        trees: list[Tree] = [{} for _ in range(shards)]

        def put(module: str, name: str, parts: list[np.ndarray]) -> None:
            for tree, part in zip(trees, parts, strict=True):
                tree.setdefault(f"causal_transformer_shard/~/{module}", {})[name] = np.ascontiguousarray(part)

        def norm(module: str, name: str) -> None:
            for theirs, ours in (("scale", "weight"), ("offset", "bias")):
                put(module, theirs, self._first(weights[f"{name}.{ours}"]))

        bias = self.random.standard_normal((shards, config.n_embd)).astype(np.float32)
        embedding = weights["transformer.wte.weight"] - bias.sum(0)
        put("embedding_shard/~/linear", "w", np.split(embedding, shards))
        put("embedding_shard/~/linear", "b", list(bias))
        for layer in range(config.n_layer):
            here, there = f"layer_{layer}/~/", f"transformer.h.{layer}."
            for theirs, ours in (("linear", "q"), ("linear_1", "v"), ("linear_2", "k")):
                put(here + theirs, "w", np.split(weights[f"{there}attn.{ours}_proj.weight"].T, shards, axis=1))
            put(here + "linear_3", "w", np.split(weights[f"{there}attn.out_proj.weight"].T, shards))
            put(here + "linear_4", "w", np.split(weights[f"{there}mlp.fc_in.weight"].T, shards, axis=1))
            put(here + "linear_4", "b", np.split(weights[f"{there}mlp.fc_in.bias"], shards))
            put(here + "linear_5", "w", np.split(weights[f"{there}mlp.fc_out.weight"].T, shards))
            put(here + "linear_5", "b", self._summands(weights[f"{there}mlp.fc_out.bias"]))
            norm(here + "replicated_layer_norm", f"{there}ln_1")
        norm("projection_shard/~/replicated_layer_norm", "transformer.ln_f")
        put("projection_shard/~/linear", "w", np.split(weights["lm_head.weight"].T, shards, axis=1))
        put("projection_shard/~/linear", "b", np.split(weights["lm_head.bias"], shards))
        self.trees = trees

    def _first(self, vector: np.ndarray) -> list[np.ndarray]:
        noise = self.random.standard_normal((self.count - 1, len(vector))).astype(np.float32)
        return [vector, *noise]

    def _summands(self, vector: np.ndarray) -> list[np.ndarray]:
        parts = self.random.standard_normal((self.count - 1, len(vector))).astype(np.float32)
        return [vector - parts.sum(0), *parts]

    def write(self, folder: Path, *, dtype: str = "f4", full: bool = False, step: int = 383_500) -> Path:
        """`shard_0/0.npz` and so on; with the optimizer's leaves if `full`."""
        for number, tree in enumerate(self.trees):
            parameters = [cast(tree[module][name], dtype) for module in sorted(tree) for name in sorted(tree[module])]
            leaves = [*parameters, np.array(step, np.int32)]
            if full:
                noise = [self.random.standard_normal(leaf.shape).astype(np.float32) for leaf in parameters]
                leaves = [np.array(step, np.int32), *noise, *noise, np.array(step, np.int32), *leaves]
            shard = folder / f"shard_{number}"
            shard.mkdir(parents=True)
            size, longer = divmod(len(leaves), 16)
            start = 0
            for piece in range(16):
                stop = start + size + (piece < longer)
                with (shard / f"{piece}.npz").open("wb") as file:
                    np.savez(file, *leaves[start:stop])
                start = stop
        return folder

    def values(self) -> dict[str, Any]:
        """That project's JSON configuration."""
        config = self.config
        return {
            "layers": config.n_layer, "d_model": config.n_embd, "n_heads": config.n_head, "n_vocab": config.vocab_size,
            "norm": "layernorm", "pe": "rotary", "pe_rotary_dims": config.rotary_dim, "seq": config.n_positions,
            "cores_per_replica": self.count, "per_replica_batch": 1, "bucket": "a", "model_dir": "b",
        }  # fmt: skip


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """In `f4`, `f2`, or bf16 as NumPy knows it: two bytes of no kind."""
    if dtype != "V2":
        return array.astype(dtype)
    rounded: Tensor = torch.from_numpy(array).bfloat16().view(torch.int16)
    return np.ascontiguousarray(rounded.numpy().view("V2"))


@pytest.fixture
def mesh_config(small_config: ModelConfig) -> ModelConfig:
    """Eleven layers: as strings they sort 0, 1, 10, 2."""
    return small_config.model_copy(
        update={
            "n_layer": 11, "vocab_size": 104, "n_embd": 32, "bos_token_id": None, "eos_token_id": None, "rotary_dim": 4,
        }
    )  # fmt: skip


@pytest.fixture
def mesh(tiny: Any, mesh_config: ModelConfig) -> Callable[[int], Mesh]:
    """The same model cut into a number of shards."""
    return lambda shards: Mesh(tiny.oracle(mesh_config), mesh_config, shards)
