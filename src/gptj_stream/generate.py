"""Continue prompts: prefill, then one token at a time from a key/value cache.

Shape suffixes: P prompts, H heads, K head size, T cached positions, V vocabulary, N tokens of a pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.model import DocumentAttention
from gptj_stream.options import GenerateOptions
from gptj_stream.pretrained import Pretrained, load


@dataclass(frozen=True)
class Piece:
    """Text as it is produced.

    Attributes:
        index: of the prompt it continues.
        text: may be empty in the last piece.
        finished: why the continuation ends with it (`eos`, `stop` or `length`), or None while it goes on.
    """

    index: int
    text: str
    finished: str | None = None


def generate(options: GenerateOptions, model: Pretrained | None = None) -> list[str]:
    """The continuations of all prompts, without the prompts.

    Args:
        model: already loaded, for repeated calls; `options.model` is then not read.

    Raises:
        UserError: as `stream`.
    """
    texts = [""] * len(read_prompts(options))
    for piece in stream(options, model):
        texts[piece.index] += piece.text
    return texts


def stream(options: GenerateOptions, model: Pretrained | None = None) -> Iterator[Piece]:
    """The continuations of all prompts, together, piece by piece.

    Raises:
        UserError: no checkpoint, no prompt, or a prompt that with `max_new_tokens` exceeds the model's positions.
    """
    prompts = read_prompts(options)
    model = model or load(options.model, precision=options.precision, device=options.device)
    encoded = [model.tokenizer.encode(prompt) or [model.tokenizer.eos_token_id] for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        model.config.check_ids(ids)
        if len(ids) + options.max_new_tokens > model.config.n_positions:
            raise UserError(
                f"a prompt of {len(ids)} tokens ({prompt[:30]!r}) and {options.max_new_tokens} new ones exceed the "
                f"model's {model.config.n_positions} positions; shorten it or lower --max-new-tokens"
            )
    return _decode(model, encoded, options)


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts given directly, then those of the prompt file.

    Raises:
        UserError: a prompt file that cannot be read, or a line without a prompt.
    """
    return [*options.prompt, *(_read_prompt_file(options.prompt_file) if options.prompt_file else ())]


def _read_prompt_file(path: Path) -> Iterator[str]:
    try:
        # not splitlines, which also cuts at the Unicode line separators that JSON strings may hold
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: it holds no prompt")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        prompt = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"{path}:{number}: expected an object with a `prompt` (or `text`) that is a string")
        yield prompt


class KeyValueCache:
    """One block's keys and values of every prompt, and its attention to them.

    The first call takes whole prompts, end to end; each later call one token a prompt.
    """

    def __init__(
        self, lengths: Sequence[int], capacity: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (len(lengths), config.n_head, capacity, config.head_dim)
        self._keys_PHTK = torch.zeros(shape, dtype=dtype, device=device)
        self._values_PHTK = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths = list(lengths)
        self._filled = False

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        if self._filled:
            return self._decode(q_NHK, k_NHK, v_NHK)
        self._filled = True
        for p, (k, v) in enumerate(zip(k_NHK.split(self._lengths), v_NHK.split(self._lengths), strict=True)):
            self._keys_PHTK[p, :, : len(k)] = k.transpose(0, 1)
            self._values_PHTK[p, :, : len(v)] = v.transpose(0, 1)
        return DocumentAttention(tuple(self._lengths))(q_NHK, k_NHK, v_NHK)

    def _decode(self, q_PHK: Tensor, k_PHK: Tensor, v_PHK: Tensor) -> Tensor:
        prompts = torch.arange(len(self._lengths), device=q_PHK.device)
        ends = torch.tensor(self._lengths, device=q_PHK.device)
        self._keys_PHTK[prompts, :, ends] = k_PHK
        self._values_PHTK[prompts, :, ends] = v_PHK
        self._lengths = [length + 1 for length in self._lengths]
        longest = max(self._lengths)
        visible_P11T = (torch.arange(longest, device=q_PHK.device) <= ends[:, None])[:, None, None]
        keys, values = self._keys_PHTK[:, :, :longest], self._values_PHTK[:, :, :longest]
        return F.scaled_dot_product_attention(q_PHK.unsqueeze(2), keys, values, attn_mask=visible_P11T).squeeze(2)


def _decode(model: Pretrained, prompts: list[list[int]], options: GenerateOptions) -> Iterator[Piece]:
    executor, config = model.executor, model.config
    lengths = [len(ids) for ids in prompts]
    capacity = max(lengths) + options.max_new_tokens
    caches = [
        KeyValueCache(lengths, capacity, config, executor.store.dtype, executor.store.device)
        for _ in range(config.n_layer)
    ]
    samplers = [Sampler(options, index) for index in range(len(prompts))]
    texts = [StoppingText(model.tokenizer, options.stop) for _ in prompts]
    running = set(range(len(prompts)))

    input_ids = torch.tensor([token for ids in prompts for token in ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows = torch.tensor(lengths).cumsum(0) - 1
    for produced in range(1, options.max_new_tokens + 1):
        logits_PV = executor.logits(input_ids, positions, caches.__getitem__, rows).float().cpu()
        tokens = [sampler(logits_V) for sampler, logits_V in zip(samplers, logits_PV, strict=True)]
        for index in sorted(running):
            text, finished = texts[index].add(tokens[index], last=produced == options.max_new_tokens)
            if finished:
                running.discard(index)
            if text or finished:
                yield Piece(index, text, finished)
        if not running:
            return
        input_ids, rows = torch.tensor(tokens), torch.arange(len(prompts))
        positions = torch.tensor([length + produced - 1 for length in lengths])


class Sampler:
    """Chooses a prompt's next token: greedily, or from its own random numbers."""

    def __init__(self, options: GenerateOptions, index: int) -> None:
        self._options = options
        self._generator = torch.Generator().manual_seed(options.seed + index)

    def __call__(self, logits_V: Tensor) -> int:
        options = self._options
        if options.temperature == 0:
            return int(logits_V.argmax())
        scores, order = (logits_V / options.temperature).sort(descending=True)
        if options.top_k:
            scores, order = scores[: options.top_k], order[: options.top_k]
        probabilities = scores.softmax(-1)
        # the first token that reaches the share stays in
        probabilities[probabilities.cumsum(-1) - probabilities >= options.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])


class StoppingText:
    """A continuation's text, held back while it may be the beginning of a stop string or of a character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.stream()
        self._eos_token_id = tokenizer.eos_token_id
        self._stop = stop
        self._held = ""

    def add(self, token: int, *, last: bool) -> tuple[str, str | None]:
        """Take a token; return the text that is now certain, and why the continuation ends here, if it does."""
        if token == self._eos_token_id:
            return self._release(0), "eos"
        self._held += self._decoder.step(token) or ""
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            return self._held[: min(found)], "stop"
        if last:
            return self._release(0), "length"
        return self._release(self._stop_prefix()), None

    def _release(self, keep: int) -> str:
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _stop_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
