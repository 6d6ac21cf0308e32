"""Evaluation, against sums made by hand from transformers' logits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.evaluate import Evaluation, evaluate
from gptj_stream.options import EvaluateOptions, PrepareOptions
from gptj_stream.prepare import prepare

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

# (ids before, ids to predict): one context window
Window = tuple[Sequence[int], Sequence[int]]


@pytest.fixture(scope="module")
def oracle(tiny: Any, job_config: ModelConfig) -> GPTJForCausalLM:
    """The model that `checkpoint` holds."""
    return tiny.oracle(job_config).eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def evaluated(model: Path, *data: Path, **options: Any) -> Evaluation:
    return evaluate(EvaluateOptions(model=model, data=data, **{"precision": "fp32"} | options))


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def nats(model: GPTJForCausalLM, windows: Sequence[Window]) -> float:
    """Total negative log-likelihood of each window's last ids, given those before."""
    total = 0.0
    for before, targets in windows:
        ids = torch.tensor([*before, *targets])
        log_p = model(ids[None, :-1]).logits[0].double().log_softmax(-1)
        scored = log_p[torch.arange(len(ids) - 1), ids[1:]]
        total -= scored[-len(targets) :].sum().item()
    return total


def test_text_by_hand(checkpoint: Path, corpus: Path, oracle: GPTJForCausalLM, tokenizer: Tokenizer) -> None:
    """Every token of a document and its end count, the first given the end of text alone."""
    texts = [record["text"] for record in records(corpus / "heldout.jsonl")]
    eos = tokenizer.eos_token_id
    windows = [([eos], [*tokenizer.encode(text), eos]) for text in texts]
    windows = [
        ([targets[first - 1]] if first else before, targets[first : first + 64])  # 64 positions, then a new window
        for before, targets in windows
        for first in range(0, len(targets), 64)
    ]
    result = evaluated(checkpoint, corpus / "heldout.jsonl")
    total = nats(oracle, windows)
    targets = sum(len(ids) for _, ids in windows)
    nbytes = sum(len(text.encode()) for text in texts)
    assert (result.target_tokens, result.text_bytes, result.documents) == (targets, nbytes, len(texts))
    # fp32 sums in another order: a few parts in 1e7 a token
    assert result.loss == pytest.approx(total / targets, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / nbytes, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / targets), rel=1e-5)


def test_longer_documents_are_cut(
    checkpoint: Path, corpus: Path, oracle: GPTJForCausalLM, tokenizer: Tokenizer
) -> None:
    text = (corpus / "text.txt").read_text(encoding="utf-8")
    stream = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    length = 24
    windows = [(stream[i : i + 1], stream[i + 1 : i + 1 + length]) for i in range(0, len(stream) - 1, length)]
    result = evaluated(checkpoint, corpus / "text.txt", sequence_length=length)
    assert result.target_tokens == len(stream) - 1
    assert result.loss == pytest.approx(nats(oracle, windows) / (len(stream) - 1), rel=1e-6)


def test_of_pairs_the_completions_count(
    checkpoint: Path, corpus: Path, oracle: GPTJForCausalLM, tokenizer: Tokenizer
) -> None:
    pairs = records(corpus / "pairs.jsonl")
    eos = tokenizer.eos_token_id
    windows = [(tokenizer.encode(p["prompt"]), [*tokenizer.encode(p["completion"]), eos]) for p in pairs]
    result = evaluated(checkpoint, corpus / "pairs.jsonl")
    targets = sum(len(ids) for _, ids in windows)
    nbytes = sum(len(pair["completion"].encode()) for pair in pairs)
    assert (result.target_tokens, result.text_bytes, result.documents) == (targets, nbytes, len(pairs))
    total = nats(oracle, windows)
    assert result.loss == pytest.approx(total / targets, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / nbytes, rel=1e-6)


def test_a_model_that_knows_nothing(checkpoint: Path, corpus: Path, job_config: ModelConfig, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"].zero_()
    weights["lm_head.bias"].zero_()
    save_file(weights, model / "model.safetensors")
    result = evaluated(model, corpus / "heldout.jsonl")
    assert result.loss == pytest.approx(math.log(job_config.vocab_size), rel=1e-6)
    assert result.perplexity == pytest.approx(job_config.vocab_size, rel=1e-5)


def test_a_document_does_not_see_its_neighbours(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    """The parts' totals add up to the whole's, whatever lies beside what."""
    lines = (corpus / "heldout.jsonl").read_text().splitlines()
    whole = evaluated(checkpoint, corpus / "heldout.jsonl")
    total = 0.0
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line)
        part = evaluated(checkpoint, path)
        total += part.loss * part.target_tokens
    # a matrix product of other height rounds otherwise: fp32
    assert whole.loss * whole.target_tokens == pytest.approx(total, rel=1e-6)
    for size in (1, 3):
        assert evaluated(checkpoint, corpus / "heldout.jsonl", micro_batch_size=size).loss == pytest.approx(
            whole.loss, rel=1e-6
        )


def test_prepared_data_gives_the_same(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    prepare(PrepareOptions(model=checkpoint, data=(corpus / "pairs.jsonl",), output=tmp_path / "tokens"))
    assert evaluated(checkpoint, tmp_path / "tokens") == evaluated(checkpoint, corpus / "pairs.jsonl")


def test_bf16_is_close(checkpoint: Path, corpus: Path) -> None:
    exact = evaluated(checkpoint, corpus / "heldout.jsonl")
    rounded = evaluated(checkpoint, corpus / "heldout.jsonl", precision="bf16")
    assert rounded.loss != exact.loss
    # bf16 rounds each logit (of about 1) by up to 2^-9; over 600 targets that averages out to well under 1 %
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)


def test_it_leaves_the_data_alone(checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    evaluated(checkpoint, data / "heldout.jsonl")
    assert sorted(data.rglob("*")) == before
