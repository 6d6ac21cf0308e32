"""GPT-J's mathematics: rotary positions, attention, Block, Embed, Head. No I/O, no devices, no optimizer.

The modules are templates. They carry Hugging Face's parameter names and are built on the meta device; the executor
calls them with the weights of the layer whose turn it is (`torch.func.functional_call`).

Shape suffixes: N tokens of a micro-batch, end to end; D model width (n_embd); H heads; K head size; R rotary_dim;
F feed-forward width; V vocabulary. `q_NHK` has shape (N, H, K).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptj_stream.batch import ROW_MULTIPLE
from gptj_stream.config import ModelConfig
from gptj_stream.feed_forward import feed_forward
from gptj_stream.loss import linear_cross_entropy
from gptj_stream.token_sums import Embedding, LayerNorm

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_NHK, k_NHK, v_NHK) -> weighted values (N, H, K). Training attends within documents, decoding to a cache."""


def rotary_table(positions_N: Tensor, rotary_dim: int) -> Tensor:
    """cos and sin of each position's angles, shape (2, N, 1, R/2), fp32.

    Frequencies are 10000^(-2i/R) (RoFormer, arXiv 2104.09864, section 3.3).
    """
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    angles = torch.outer(positions_N.float(), frequencies.to(positions_N.device))
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2)


def rotate(x_NHK: Tensor, table: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, as interleaved pairs (0, 1), (2, 3), ...; pass the others on."""
    cos, sin = table
    rotary_dim = 2 * cos.shape[-1]
    # split and unbind rather than slices: the backward of each slice fills a whole x_NHK with zeros
    turned_NHR, passed = x_NHK.split((rotary_dim, x_NHK.shape[-1] - rotary_dim), dim=-1)
    even, odd = turned_NHR.unflatten(-1, (-1, 2)).unbind(-1)
    rotated_NHR = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated_NHR.to(x_NHK.dtype), passed), dim=-1)


class DocumentAttention:
    """Causal softmax attention of each document to itself. Documents lie end to end; none sees another."""

    def __init__(self, lengths: tuple[int, ...], dropout: float = 0.0) -> None:
        self.lengths = lengths
        self.dropout = dropout
        self._groups: dict[int, list[int]] = {}  # documents by their length, rounded up: a group is one kernel call
        for document, length in enumerate(lengths):
            self._groups.setdefault(-(-length // ROW_MULTIPLE) * ROW_MULTIPLE, []).append(document)

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        if len(set(self.lengths)) == 1 and not self.dropout:
            return self._attend(*(x.unflatten(0, (len(self.lengths), -1)) for x in (q_NHK, k_NHK, v_NHK))).flatten(0, 1)
        # computed again in the backward pass: to keep padded copies, or the dropped-out weights, would take far more
        # memory than q, k and v
        out: Tensor = checkpoint(
            self._by_lengths, q_NHK, k_NHK, v_NHK, use_reentrant=False, preserve_rng_state=self.dropout > 0
        )
        return out

    def _by_lengths(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        documents = [x.split(self.lengths) for x in (q_NHK, k_NHK, v_NHK)]
        out: list[Tensor] = [q_NHK] * len(self.lengths)
        for length, group in self._groups.items():
            # filler behind a document is seen by no token of it, and its own rows are cut off again
            q, k, v = (
                torch.stack([F.pad(x[i], (0, 0, 0, 0, 0, length - self.lengths[i])) for i in group]) for x in documents
            )
            for i, rows in zip(group, self._attend(q, k, v), strict=True):
                out[i] = rows[: self.lengths[i]]
        return torch.cat(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(documents, length, H, K) each, of one length."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_ND: Tensor, table: Tensor, attend: Attention) -> Tensor:
        q_NHK, k_NHK, v_NHK = (
            project(x_ND).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_NHK = attend(rotate(q_NHK, table), rotate(k_NHK, table), v_NHK)
        return self.resid_dropout(self.out_proj(out_NHK.flatten(-2)))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, config.inner_dim)
        self.fc_out = nn.Linear(config.inner_dim, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_ND: Tensor, keep_inner: bool) -> Tensor:
        fc_in, fc_out = self.fc_in, self.fc_out
        out_ND = feed_forward(x_ND, fc_in.weight, fc_in.bias, fc_out.weight, fc_out.bias, keep_inner=keep_inner)
        return self.dropout(out_ND)


class Block(nn.Module):
    """x + attention(ln_1(x)) + feed_forward(ln_1(x)): one norm feeds both, in parallel."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config)
        self.mlp = FeedForward(config)

    def forward(self, x_ND: Tensor, table: Tensor, attend: Attention, keep_inner: bool = True) -> Tensor:
        h_ND = self.ln_1(x_ND)
        return self.attn(h_ND, table, attend) + self.mlp(h_ND, keep_inner) + x_ND


class Embed(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": Embedding(config.vocab_size, config.n_embd)})
        self.drop = nn.Dropout(config.embd_pdrop)

    def forward(self, input_ids_N: Tensor) -> Tensor:
        return self.drop(self.transformer["wte"](input_ids_N))


class Head(nn.Module):
    """Final norm and vocabulary projection, which is not tied to the embedding and has a bias."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"ln_f": LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)})
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, x_ND: Tensor, targets_N: Tensor | None = None) -> Tensor:
        """Negative log-likelihood of each target, (N,) fp32 (0 where ignored); without targets the logits, (N, V)."""
        h_ND = self.transformer["ln_f"](x_ND)
        if targets_N is None:
            return self.lm_head(h_ND)
        return linear_cross_entropy(h_ND, self.lm_head.weight, self.lm_head.bias, targets_N)


def layer_templates(config: ModelConfig) -> list[tuple[str, nn.Module]]:
    """The layers in the order of the forward pass, each with the prefix that makes its names Hugging Face's.

    All blocks share one template: they differ in weights alone.
    """
    with torch.device("meta"):
        embed, block, head = Embed(config), Block(config), Head(config)
    return [("", embed), *((f"transformer.h.{i}.", block) for i in range(config.n_layer)), ("", head)]


@torch.no_grad()
def initialize(name: str, parameter: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Fill one parameter with fresh weights by mesh-transformer-jax's scheme (its layers.py).

    Normal, cut at two standard deviations of: 1/sqrt(V) for the embedding, 2/(n_layer sqrt(D)) for the two
    projections into the residual stream, 1/sqrt(D) for the other matrices. Norms start at 1, biases at 0.

    `name` is Hugging Face's full name; the caller seeds `generator`.
    """
    if name.endswith(".bias"):
        parameter.zero_()
    elif ".ln_" in name:
        parameter.fill_(1.0)
    else:
        std = config.n_embd**-0.5
        if name.endswith("wte.weight"):
            std = config.vocab_size**-0.5
        elif name.endswith(("out_proj.weight", "fc_out.weight")):
            std *= 2 / config.n_layer
        nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)
