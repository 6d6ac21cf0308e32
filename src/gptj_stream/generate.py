"""Continue prompts: prefill, then one token at a time from a key/value cache.

Shape suffixes: P prompts, H heads, K head size, T cached positions, V vocabulary, N tokens of a pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.model import Attention, DocumentAttention
from gptj_stream.options import GenerateOptions
from gptj_stream.pretrained import Pretrained, check_memory, open_model
from gptj_stream.seeding import derived_seed


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
    prompts = read_prompts(options)
    texts = [""] * len(prompts)
    for piece in continue_prompts(prompts, options, model or open_model(options)):
        texts[piece.index] += piece.text
    return texts


def stream(options: GenerateOptions, model: Pretrained | None = None) -> Iterator[Piece]:
    """The continuations of all prompts, piece by piece.

    Raises:
        UserError: no checkpoint, or as `read_prompts` and `continue_prompts`.
    """
    return continue_prompts(read_prompts(options), options, model or open_model(options))


def continue_prompts(prompts: Sequence[str], options: GenerateOptions, model: Pretrained) -> Iterator[Piece]:
    """The continuations of these prompts, `options.micro_batch_size` of them together, piece by piece.

    Raises:
        UserError: at the call, before any piece: a prompt that is not Unicode or with `max_new_tokens` exceeds the
            model's positions, or keys and values that do not fit in memory.
    """
    encoded = [
        _encode(prompt, f"prompt {number} of {len(prompts)}", options, model)
        for number, prompt in enumerate(prompts, 1)
    ]
    size = options.micro_batch_size
    groups = {first: encoded[first : first + size] for first in range(0, len(encoded), size)}
    store = model.executor.store
    for group in groups.values():
        shape = len(group), _capacity(group, options)
        check_memory(
            f"keys and values of {shape[0]} prompts together, {shape[1]} positions each (lower --micro-batch-size or "
            "--max-new-tokens)",
            2 * model.config.n_layer * model.config.n_embd * math.prod(shape) * store.dtype.itemsize,
            store.device,
        )
    return chain.from_iterable(_continue_group(model, first, group, options) for first, group in groups.items())


def _encode(prompt: str, which: str, options: GenerateOptions, model: Pretrained) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{which}: character {error.start} is half a surrogate pair, or a byte that is not UTF-8; remove it"
        ) from None
    ids = model.tokenizer.encode(prompt) or [model.tokenizer.eos_token_id]
    model.config.check_ids(ids)
    if len(ids) + options.max_new_tokens > model.config.n_positions:
        raise UserError(
            f"a prompt of {len(ids)} tokens ({prompt[:30]!r}) and {options.max_new_tokens} new ones exceed the "
            f"model's {model.config.n_positions} positions; shorten it or lower --max-new-tokens"
        )
    return ids


def _capacity(prompts: Sequence[list[int]], options: GenerateOptions) -> int:
    """Positions that a cache holds of each of the prompts."""
    return max(map(len, prompts)) + options.max_new_tokens


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
        except (ValueError, RecursionError) as error:  # also a number or a nesting beyond Python's limits
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        prompt = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"{path}:{number}: expected an object with a `prompt` (or `text`) that is a string")
        yield prompt


class KeyValueCache:
    """Every block's keys and values of every prompt, and the attention to them.

    Attributes:
        lengths: positions cached of each prompt, also the place of its next token.
    """

    def __init__(
        self, lengths: Sequence[int], capacity: int, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.lengths = list(lengths)
        shape = (len(lengths), config.n_head, capacity, config.head_dim)
        self._blocks = [  # keys_PHTK and values_PHTK
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.n_layer)
        ]
        self._device = device

    def prefill(self) -> Callable[[int], Attention]:
        """The blocks' attention in the first pass, which takes whole prompts, end to end."""
        attend = DocumentAttention(tuple(self.lengths))

        def block(number: int) -> Attention:
            cached = self._blocks[number]

            def attention(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
                for cache_PHTK, new_NHK in zip(cached, (k_NHK, v_NHK), strict=True):
                    for cache_HTK, new in zip(cache_PHTK, new_NHK.split(self.lengths), strict=True):
                        cache_HTK[:, : len(new)] = new.transpose(0, 1)
                return attend(q_NHK, k_NHK, v_NHK)

            return attention

        return block

    def extend(self) -> Callable[[int], Attention]:
        """The blocks' attention in a later pass, which takes one token more of each prompt."""
        prompts = torch.arange(len(self.lengths), device=self._device)
        ends = torch.tensor(self.lengths, device=self._device)
        self.lengths = [length + 1 for length in self.lengths]
        longest = max(self.lengths)
        visible_P11T = (torch.arange(longest, device=self._device) <= ends[:, None])[:, None, None]

        def block(number: int) -> Attention:
            keys_PHTK, values_PHTK = self._blocks[number]

            def attention(q_PHK: Tensor, k_PHK: Tensor, v_PHK: Tensor) -> Tensor:
                keys_PHTK[prompts, :, ends] = k_PHK
                values_PHTK[prompts, :, ends] = v_PHK
                keys, values = keys_PHTK[:, :, :longest], values_PHTK[:, :, :longest]
                out = F.scaled_dot_product_attention(q_PHK.unsqueeze(2), keys, values, attn_mask=visible_P11T)
                return out.squeeze(2)

            return attention

        return block

    def keep(self, prompts: Sequence[int]) -> None:
        """Forget the other prompts."""
        self.lengths = [self.lengths[prompt] for prompt in prompts]
        kept = torch.tensor(prompts, device=self._device)
        for number, (keys, values) in enumerate(self._blocks):  # one block at a time is there twice
            self._blocks[number] = keys.index_select(0, kept), values.index_select(0, kept)


def _continue_group(
    model: Pretrained, first: int, prompts: Sequence[list[int]], options: GenerateOptions
) -> Iterator[Piece]:
    """The continuations of prompts `first`, `first` + 1, ..., together."""
    executor, tokenizer = model.executor, model.tokenizer
    lengths = [len(ids) for ids in prompts]
    cache = KeyValueCache(
        lengths, _capacity(prompts, options), model.config, executor.store.dtype, executor.store.device
    )
    running = [
        (index, Sampler(options, index), StoppingText(tokenizer, options.stop))
        for index in range(first, first + len(prompts))
    ]

    input_ids = torch.tensor([token for ids in prompts for token in ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows: Tensor | None = torch.tensor(lengths).cumsum(0) - 1
    attention = cache.prefill()
    for produced in range(1, options.max_new_tokens + 1):
        logits_PV = executor.logits(input_ids, positions, attention, rows).float().cpu()
        logits_PV = logits_PV[:, : tokenizer.vocab_size]  # a model may have rows to spare, which stand for no text
        tokens: list[int] = []
        kept: list[int] = []
        for row, ((index, sampler, stopping), logits_V) in enumerate(zip(running, logits_PV, strict=True)):
            token = sampler(logits_V)
            text, finished = stopping.add(token, last=produced == options.max_new_tokens)
            if not finished:
                tokens.append(token)
                kept.append(row)
            if text or finished:
                yield Piece(index, text, finished)
        if not kept:
            return
        if len(kept) < len(running):
            cache.keep(kept)
            running = [running[row] for row in kept]
        input_ids, positions, rows = torch.tensor(tokens), torch.tensor(cache.lengths), None
        attention = cache.extend()


class Sampler:
    """Chooses a prompt's next token: greedily, or from its own random numbers."""

    def __init__(self, options: GenerateOptions, index: int) -> None:
        self._options = options
        self._generator = torch.Generator().manual_seed(derived_seed(options.seed, index))

    def __call__(self, logits_V: Tensor) -> int:
        options = self._options
        if options.temperature == 0:
            return int(logits_V.argmax())
        scores, order = logits_V.double().sort(descending=True)
        if options.top_k:
            scores, order = scores[: options.top_k], order[: options.top_k]
        # the maximum becomes 0, which no temperature makes infinite
        probabilities = ((scores - scores[0]) / options.temperature).softmax(-1)
        if options.top_p < 1:
            # the first token that reaches the share stays in
            probabilities[probabilities.cumsum(-1) - probabilities >= options.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])


class StoppingText:
    """A continuation's text, held back while it may be the beginning of a stop string or of a character."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoded = tokenizer.stream()
        self._eos_token_id = tokenizer.eos_token_id
        self._stop = stop
        self._held = ""

    def add(self, token: int, *, last: bool) -> tuple[str, str | None]:
        """Take a token; return the text that is now certain, and why the continuation ends here, if it does."""
        ended = "eos" if token == self._eos_token_id else "length" if last else None
        if ended != "eos":
            self._held += self._decoded.step(token)
        if ended:
            self._held += self._decoded.flush()
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if found:
            return self._held[: min(found)], "stop"
        return self._release(0 if ended else self._stop_prefix()), ended

    def _release(self, keep: int) -> str:
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _stop_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n]))
        return max(lengths, default=0)
