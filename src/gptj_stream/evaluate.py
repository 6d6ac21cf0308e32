"""Loss, perplexity and bits per byte on held-out data."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from gptj_stream.config import ModelConfig
from gptj_stream.data.batches import evaluation_batches
from gptj_stream.data.packing import pack
from gptj_stream.data.tokens import TokenDataset
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor
from gptj_stream.options import EvaluateOptions
from gptj_stream.prepare import open_data
from gptj_stream.pretrained import open_model
from gptj_stream.report import Advance, Report


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a dataset.

    Attributes:
        loss: mean negative log-likelihood of a target token, in nats.
        perplexity: exp(loss).
        bits_per_byte: total negative log-likelihood in bits over the UTF-8 bytes of the text that carries loss;
            comparable between tokenizers, and with a compressor.
        target_tokens: how many tokens were predicted.
        text_bytes: the bytes they stand for.
        documents: how many documents hold them.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    target_tokens: int
    text_bytes: int
    documents: int


class HeldOut:
    """Held-out tokens, checked and laid out for one model: each document on its own, the long ones in pieces."""

    def __init__(self, dataset: TokenDataset, config: ModelConfig, sequence_length: int) -> None:
        """Raises:
        UserError: a token id outside the model's vocabulary, or nothing to predict.
        """
        dataset.check_ids(config.vocab_size)
        self.dataset = dataset
        self.packing = pack(dataset, sequence_length, "documents", "split")


def evaluate(options: EvaluateOptions, report: Report | None = None) -> Evaluation:
    """Evaluate a checkpoint. Every learned token counts once; a document sees itself alone.

    Raises:
        UserError: a folder that is not a checkpoint, bad data, or a sequence length beyond the model's positions.
    """
    report = report or Report()
    model = open_model(options, report)
    sequence_length = checked_sequence_length(options.sequence_length, model.config)
    with tempfile.TemporaryDirectory() as cache:
        dataset = open_data(options.data, model.tokenizer, Path(cache) / "held-out", report)
        held_out = HeldOut(dataset, model.config, sequence_length)
        with report.bar("evaluate", 1.0) as advance:
            return evaluate_on(held_out, model.executor, options.micro_batch_size, advance)


def evaluate_on(held_out: HeldOut, executor: Executor, micro_batch_size: int, advance: Advance) -> Evaluation:
    """Evaluate on held-out tokens. Later pieces of a document that was cut see less context than they would whole."""
    dataset, packing = held_out.dataset, held_out.packing
    total, targets, rows = 0.0, 0, 0
    for batch in evaluation_batches(dataset, packing, micro_batch_size):
        total += executor.token_losses(batch).sum(dtype=torch.float64).item()
        targets += batch.target_count
        rows = min(rows + micro_batch_size, packing.rows)
        advance(rows / packing.rows, f"loss {total / targets:.4f}")
    loss, nbytes = total / targets, dataset.manifest.text_bytes
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # beyond, a float overflows
        bits_per_byte=total / math.log(2) / nbytes,
        target_tokens=targets,
        text_bytes=nbytes,
        documents=dataset.manifest.documents,
    )


def checked_sequence_length(sequence_length: int | None, config: ModelConfig) -> int:
    """The asked-for length, or the model's own up to 2048.

    Raises:
        UserError: longer than the model's positions.
    """
    if sequence_length is None:
        return min(2048, config.n_positions)
    if sequence_length > config.n_positions:
        raise UserError(
            f"sequence_length {sequence_length} is longer than the model's {config.n_positions} positions; lower it"
        )
    return sequence_length
