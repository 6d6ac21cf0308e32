"""The model's shape: one frozen declaration, under Hugging Face's names, and the named presets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptj_stream.errors import UserError

_LARGEST = 1 << 24  # of any dimension: a file that says more is damaged, and would take hours to refuse

_ALIASES = {  # transformers' GPTJConfig takes both names, and these before the others
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


class ModelConfig(BaseModel):
    """A GPT-J's shape. Field names and defaults are those of transformers' `GPTJConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(50400, ge=1, le=_LARGEST)
    n_positions: int = Field(2048, ge=1, le=_LARGEST)
    n_embd: int = Field(4096, ge=1, le=_LARGEST)
    n_layer: int = Field(28, ge=1, le=10_000)
    n_head: int = Field(16, ge=1)
    rotary_dim: int = Field(64, ge=2)
    n_inner: int | None = Field(None, ge=1, le=_LARGEST)
    activation_function: Literal["gelu_new"] = "gelu_new"
    resid_pdrop: float = Field(0.0, ge=0.0, lt=1.0)
    embd_pdrop: float = Field(0.0, ge=0.0, lt=1.0)
    attn_pdrop: float = Field(0.0, ge=0.0, lt=1.0)
    layer_norm_epsilon: float = Field(1e-5, gt=0.0, allow_inf_nan=False)
    initializer_range: float = Field(0.02, gt=0.0)  # only carried on: fresh weights follow `model.initialize`
    tie_word_embeddings: Literal[False] = False
    bos_token_id: int | None = Field(50256, ge=0)
    eos_token_id: int | None = Field(50256, ge=0)

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} must be even and at most the head size {self.head_dim} (n_embd / n_head)"
            )
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} {token} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the feed-forward's hidden layer: `n_inner`, or 4 x `n_embd` where that is null."""
        return self.n_inner or 4 * self.n_embd

    @property
    def block_parameters(self) -> int:
        d, f = self.n_embd, self.inner_dim
        return 4 * d * d + 2 * d * f + f + d + 2 * d

    @property
    def parameters(self) -> int:
        d, v = self.n_embd, self.vocab_size
        return v * d + self.n_layer * self.block_parameters + 2 * d + v * d + v

    def training_flops(self, tokens: int, targets: int, mean_context: float) -> float:
        """Useful FLOPs of a training step: 6 a weight and token of each matrix product, and causal attention.

        The vocabulary projection counts for the `targets` alone, since no other position is projected. Attention
        costs 4 x n_embd a position attended to, token and layer forward (scores and weighted values), twice that
        backward. Recomputation does not count. (PaLM, arXiv 2204.02311, appendix B.)
        """
        d, f = self.n_embd, self.inner_dim
        blocks = 6.0 * (4 * d * d + 2 * d * f) + 12.0 * d * mean_context
        return self.n_layer * blocks * tokens + 6.0 * self.vocab_size * d * targets

    def check_ids(self, ids: Sequence[int]) -> None:
        """Refuse token ids that the model cannot take.

        Raises:
            UserError: an id outside the vocabulary, or more ids than positions.
        """
        if len(ids) > self.n_positions:
            raise UserError(f"{len(ids)} tokens exceed the model's {self.n_positions} positions; shorten the text")
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise UserError(
                f"token id {outside[0]} is out of range of the model's vocabulary of {self.vocab_size}; "
                "use the model's own tokenizer"
            )

    def with_dropout(self, dropout: float) -> ModelConfig:
        """The same model with one rate for embedding, residual and attention dropout."""
        return self.model_copy(update={"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout})

    @classmethod
    def from_huggingface(cls, values: dict[str, Any], source: str) -> ModelConfig:
        """Read a `config.json`'s values; `source` names the file in messages.

        Keys that do not change the mathematics (dtype, `use_cache`, `task_specific_params`, ...) are ignored.

        Raises:
            UserError: another architecture, or a value this model cannot have.
        """
        model_type = values.get("model_type")
        if model_type != "gptj":
            raise UserError(
                f"{source}: model_type is {model_type!r}; this program trains GPT-J checkpoints ('gptj') only"
            )
        if values.get("quantization_config"):
            raise UserError(
                f"{source}: the checkpoint is quantized (quantization_config); start from the fp32, fp16 or bf16 one"
            )
        values = values | {name: values[alias] for alias, name in _ALIASES.items() if alias in values}
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        if known.get("tie_word_embeddings") is None:
            known.pop("tie_word_embeddings", None)  # older configs leave it out; GPT-J never ties
        rows = known.get("vocab_size", cls.model_fields["vocab_size"].default)
        for name in ("bos_token_id", "eos_token_id"):
            token = known.get(name, cls.model_fields[name].default)
            token = token[0] if isinstance(token, list) and token else token  # several may end a text; the first is eos
            # transformers writes GPT-2's ids for a vocabulary of any size; they are no part of the mathematics
            outside = type(token) is int and type(rows) is int and token >= rows
            known[name] = None if outside else token
        try:
            return cls(**known)
        except ValidationError as error:
            raise UserError(f"{source}: {first_validation_error(error)}") from None

    def to_huggingface(self) -> dict[str, Any]:
        """The values of a `config.json` that transformers accepts as it is."""
        return {"model_type": "gptj", "architectures": ["GPTJForCausalLM"], **self.model_dump(), "use_cache": True}


def first_validation_error(error: ValidationError) -> str:
    """The first of pydantic's complaints as one line: field, value given, limit."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # raised by a validator of ours: already a sentence
        return str(first["ctx"]["error"])
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{field} is required"
    return f"{field} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


# Sizes after the GPT-2 and Pythia families, all with GPT-J's rotary share of a quarter of each head.
PRESETS: dict[str, ModelConfig] = {
    "gpt-j-6b": ModelConfig(),
    "gpt-j-1.3b": ModelConfig(n_embd=2048, n_layer=24, n_head=16, rotary_dim=32),
    "gpt-j-350m": ModelConfig(n_embd=1024, n_layer=24, n_head=16, rotary_dim=16),
    "gpt-j-125m": ModelConfig(n_embd=768, n_layer=12, n_head=12, rotary_dim=16),
    "gpt-j-25m": ModelConfig(n_embd=384, n_layer=6, n_head=6, rotary_dim=16),
    "gpt-j-10m": ModelConfig(n_embd=256, n_layer=6, n_head=4, rotary_dim=16, n_positions=1024),
    "gpt-j-tiny": ModelConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=4, n_positions=256),
}
