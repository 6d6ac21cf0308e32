"""Generation: greedy as transformers does it, sampling as asked for, text as it is produced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gptj_stream.config import ModelConfig
from gptj_stream.data.tokenizer import Tokenizer
from gptj_stream.errors import UserError
from gptj_stream.executor import Executor
from gptj_stream.generate import (
    Piece,
    Sampler,
    StoppingText,
    continue_prompts,
    generate,
    read_prompts,
    stream,
)
from gptj_stream.options import GenerateOptions
from gptj_stream.pretrained import Pretrained, load

if TYPE_CHECKING:
    from transformers import GPTJForCausalLM

PROMPTS = ("The cat", "Das K", "One fish hears the moon 🌙. A dog likes some bread. My bird", "o", "")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def model(trained: Path) -> Pretrained:
    """It has learned the corpus."""
    return load(trained, precision="fp32")


@pytest.fixture(scope="module")
def random_model(checkpoint: Path) -> Pretrained:
    """It produces every token, in any order."""
    return load(checkpoint, precision="fp32")


def asked(*prompts: str, **values: Any) -> GenerateOptions:
    return GenerateOptions(model=Path("unread"), prompt=prompts, **{"max_new_tokens": 24} | values)


def transformers_ids(model: GPTJForCausalLM, ids: Sequence[int], new: int, vocab_size: int) -> list[int]:
    """Greedy, one prompt on its own, of the tokenizer's own tokens."""
    spare = list(range(vocab_size, model.config.vocab_size))
    out = model.generate(
        torch.tensor([list(ids)]), max_new_tokens=new, do_sample=False, pad_token_id=0, suppress_tokens=spare
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("which", ["trained", "checkpoint"])
def test_greedy_equals_transformers(which: str, request: pytest.FixtureRequest, tokenizer: Tokenizer) -> None:
    from transformers import GPTJForCausalLM  # noqa: PLC0415  (seconds)

    folder: Path = request.getfixturevalue(which)
    oracle = GPTJForCausalLM.from_pretrained(folder)
    # together, of different lengths
    pieces = list(stream(asked(*PROMPTS, max_new_tokens=38), load(folder, precision="fp32")))
    ended = set()
    for index, prompt in enumerate(PROMPTS):
        prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
        ids = transformers_ids(oracle, prompt_ids, 38, tokenizer.vocab_size)
        expected = "eos" if ids[-1] == tokenizer.eos_token_id else "length"
        text = tokenizer.decode(ids[:-1] if expected == "eos" else ids)
        assert "".join(piece.text for piece in pieces if piece.index == index) == text
        assert [piece.finished for piece in pieces if piece.index == index][-1] == expected
        ended.add(expected)
    assert ended == {"eos", "length"}  # both ways to end were seen


def test_logits_of_every_step_equal_transformers(random_model: Pretrained, tiny: Any, job_config: ModelConfig) -> None:
    """The chosen tokens agree by more than luck: so do the numbers they are chosen from."""
    oracle = tiny.oracle(job_config).eval()
    ids = torch.randint(job_config.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = oracle(ids[None]).logits[0]
    torch.testing.assert_close(random_model.logits(ids), expected, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def test_eos_ends_and_is_not_shown(model: Pretrained) -> None:
    pieces = list(stream(asked("The cat", max_new_tokens=48), model))
    assert pieces[-1].finished == "eos"
    assert "endoftext" not in "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("which", ["model", "random_model"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_arrives_in_pieces_that_join_to_the_whole(
    which: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    model: Pretrained = request.getfixturevalue(which)
    options = asked(*PROMPTS, temperature=temperature)
    pieces = list(stream(options, model))
    texts = generate(options, model)
    for index in range(len(PROMPTS)):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == texts[index]
        assert [piece.finished is not None for piece in own] == [False] * (len(own) - 1) + [True]
        assert all(piece.text for piece in own[:-1])
    assert len(pieces) > 2 * len(PROMPTS)
    assert len({piece.index for piece in pieces[: len(PROMPTS)]}) > 1  # prompts take turns


def test_the_first_piece_comes_before_the_last_token_is_computed(model: Pretrained) -> None:
    pieces = stream(asked("The cat"), model)
    first = next(pieces)
    assert first.finished is None
    assert 0 < len(first.text) < len("".join(piece.text for piece in pieces))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_from_one_token_is_greedy(model: Pretrained, options: dict[str, Any]) -> None:
    sampled = asked(*PROMPTS, **{"temperature": 1.0, "seed": 5} | options)
    assert generate(sampled, model) == generate(asked(*PROMPTS), model)


def test_the_seed_decides(model: Pretrained) -> None:
    def sampled(seed: int) -> list[str]:
        return generate(asked(*PROMPTS, temperature=1.0, seed=seed), model)

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) == 4
    same = generate(asked("The cat", "The cat", "The cat", temperature=1.0), model)
    assert len(set(same)) > 1  # each prompt draws its own numbers


def test_a_prompt_is_not_changed_by_the_others(model: Pretrained) -> None:
    for temperature in (0.0, 1.0):
        alone = generate(asked("Das K", temperature=temperature), model)[0]
        for others in (("o",), PROMPTS[2:], ("One fish hears the moon. " * 3,)):
            assert generate(asked("Das K", *others, temperature=temperature), model)[0] == alone


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each pass through the model continues."""
    counts: list[int] = []
    logits = Executor.logits

    def counted(*arguments: Any) -> torch.Tensor:
        out = logits(*arguments)
        counts.append(len(out))
        return out

    monkeypatch.setattr(Executor, "logits", counted)
    return counts


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_groups_of_prompts(model: Pretrained, passes: list[int], size: int, temperature: float) -> None:
    together = generate(asked(*PROMPTS, temperature=temperature), model)
    passes.clear()
    pieces = list(stream(asked(*PROMPTS, temperature=temperature, micro_batch_size=size), model))
    assert ["".join(piece.text for piece in pieces if piece.index == i) for i in range(len(PROMPTS))] == together
    assert max(passes) == size
    groups = [piece.index // size for piece in pieces]
    assert groups == sorted(groups)  # one after the other


def test_finished_prompts_take_no_part_any_more(model: Pretrained, passes: list[int]) -> None:
    pieces = list(stream(asked(*PROMPTS, max_new_tokens=38), model))
    reasons = [piece.finished for piece in pieces if piece.finished]
    assert {"eos", "length"} == set(reasons)
    assert passes[0] == len(PROMPTS)
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == reasons.count("length")


def test_a_cache_that_does_not_fit(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokens = model.config, len(model.tokenizer.encode("The cat"))
    needed = 2 * 4 * config.n_layer * config.n_embd * (tokens + 24)  # of one prompt
    monkeypatch.setattr("gptj_stream.pretrained.free_memory", lambda _: 2 * needed)
    prompts = ["The cat"] * 5
    with pytest.raises(UserError, match=rf"values of 3 prompts together, {tokens + 24} .*lower --micro-batch-size"):
        stream(asked(*prompts, micro_batch_size=3), model)
    assert len(generate(asked(*prompts, micro_batch_size=2), model)) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_token_are_never_chosen(
    random_model: Pretrained, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    options = asked(*PROMPTS, temperature=temperature)
    expected = generate(options, random_model)
    logits, vocab_size = Executor.logits, random_model.tokenizer.vocab_size
    assert vocab_size < random_model.config.vocab_size

    def tempting(*arguments: Any) -> torch.Tensor:
        out = logits(*arguments).clone()
        out[:, vocab_size:] += 100
        return out

    monkeypatch.setattr(Executor, "logits", tempting)
    assert generate(options, random_model) == expected


def draws(logits: torch.Tensor, count: int, **values: Any) -> Counter[int]:
    sampler = Sampler(asked("x", **values), 0)
    return Counter(sampler(logits) for _ in range(count))


def test_sampling_follows_the_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1).tolist()
        counts = draws(logits, 4000, temperature=temperature)
        for token, p in enumerate(expected):
            # four standard deviations of a binomial; the seed is fixed, so this holds once and for all
            assert abs(counts[token] / 4000 - p) <= 4 * (p * (1 - p) / 4000) ** 0.5


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    assert set(draws(logits, 500, temperature=1.0)) == {0, 1, 2, 3}
    assert set(draws(logits, 500, temperature=1.0, top_k=2)) == {1, 2}
    assert set(draws(logits, 500, temperature=1.0, top_k=99)) == {0, 1, 2, 3}
    # the share is reached with the token that crosses it
    assert set(draws(logits, 500, temperature=1.0, top_p=0.45)) == {1}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.6)) == {1, 2}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.8)) == {1, 2, 3}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.8, top_k=2)) == {1, 2}
    counts = draws(logits, 4000, temperature=1.0, top_k=2)
    p = 0.5 / 0.75  # renormalised over the two
    assert abs(counts[1] / 4000 - p) <= 4 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-46, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    assert draws(torch.tensor([30.0, -2.0, 30.5, 0.0]), 20, temperature=temperature) == {2: 20}


def test_how_many_tokens_a_share_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rounding of the sum over a whole vocabulary shows, and 1 keeps all."""
    kept: list[int] = []

    def multinomial(probabilities: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        kept.append(int(probabilities.count_nonzero()))
        return torch.tensor([0])

    monkeypatch.setattr(torch, "multinomial", multinomial)
    for top_p in (1.0, 0.99999, 0.50001):
        Sampler(asked("x", temperature=1.0, top_p=top_p), 0)(torch.zeros(50_000))
    assert kept == [50_000, 50_000, 25_001]
    Sampler(asked("x", temperature=1.0), 0)(torch.tensor([0.0, -60.0]))
    assert kept[-1] == 2


def fed(tokenizer: Tokenizer, text: str, stop: Sequence[str] = ()) -> list[tuple[str, str | None]]:
    """What comes of each of the text's tokens."""
    stopping = StoppingText(tokenizer, stop)
    ids = tokenizer.encode(text)
    return [stopping.add(token, last=n == len(ids)) for n, token in enumerate(ids, 1)]


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    text = "語日本 Kätzchen 🌙🎉 e\u0301 end"
    assert len(tokenizer.encode("語")) == 3  # one byte a token
    pieces = [piece for piece, _ in fed(tokenizer, text)]
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("ended", ["length", "eos"])
@pytest.mark.parametrize("stop", [(), ("y",), ("x \ufffd!",)])
def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer, ended: str, stop: tuple[str, ...]) -> None:
    ids = tokenizer.encode("x 語")[:-1]
    stopping = StoppingText(tokenizer, stop)
    shown = [stopping.add(token, last=False) for token in ids[:-1]]
    if ended == "eos":
        shown += [stopping.add(ids[-1], last=False), stopping.add(tokenizer.eos_token_id, last=False)]
    else:
        shown += [stopping.add(ids[-1], last=True)]
    assert "".join(text for text, _ in shown) == tokenizer.decode(ids) == "x \ufffd"
    assert [finished for _, finished in shown] == [None] * (len(shown) - 1) + [ended]


def test_a_stop_string_across_tokens(model: Pretrained) -> None:
    (whole,) = generate(asked("The cat"), model)
    tokens = [model.tokenizer.decode([token]) for token in model.tokenizer.encode(whole)]
    assert len(tokens[0]) + len(tokens[1]) > 4
    end = len(tokens[0]) + 2
    stop = whole[len(tokens[0]) - 2 : end]  # the last two characters of the first token and two of the second
    assert not any(stop in token for token in tokens[:2])
    pieces = list(stream(asked("The cat", stop=("never", stop)), model))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finished == "stop"


def test_a_stop_string_ends_its_own_prompt_alone(model: Pretrained) -> None:
    free = generate(asked(*PROMPTS), model)
    words = ("moon", "tree", "river", "bread", "door", "cat", "dog", "bird", "fox")
    stop = next(word for word in words if 0 < sum(word in text for text in free) < len(free))
    assert generate(asked(*PROMPTS, stop=(stop,)), model) == [text.split(stop)[0] for text in free]


@pytest.mark.parametrize("stop", ["moon 🌙!", "the river of", ". One fish flies", "\n"])
def test_what_may_become_a_stop_string_is_held_back(tokenizer: Tokenizer, stop: str) -> None:
    """Nothing is shown that a later token could turn into the beginning of a stop string, and in the end nothing is
    missing."""
    text = "The cat sees the river. One fish follows the moon 🌙. A dog."
    shown = ""
    pieces = fed(tokenizer, text, [stop])
    for piece, finished in pieces:
        shown += piece
        if not finished:
            assert not any(shown.endswith(stop[:n]) for n in range(1, len(stop)))
    assert shown == text
    assert pieces[-1][1] == "length"


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    pieces = fed(tokenizer, "The cat sees the river.", ["river", "sees the", "the"])
    stopped = [finished for _, finished in pieces].index("stop")
    assert "".join(piece for piece, _ in pieces[: stopped + 1]) == "The cat "


def test_held_back_text_is_released_at_the_end_of_text(tokenizer: Tokenizer) -> None:
    stopping = StoppingText(tokenizer, ["cat sees"])
    shown = "".join(stopping.add(token, last=False)[0] for token in tokenizer.encode("The cat"))
    assert shown == "The "
    assert stopping.add(tokenizer.eos_token_id, last=False) == ("cat", "eos")


def test_positions_are_a_limit(model: Pretrained) -> None:
    tokens = len(model.tokenizer.encode("The cat"))
    fits = 64 - tokens
    assert stream(asked("The cat", max_new_tokens=fits), model)
    with pytest.raises(
        UserError, match=rf"a prompt of {tokens} tokens \('The cat'\) and {fits + 1} new ones exceed the model's 64"
    ):
        stream(asked("The cat", max_new_tokens=fits + 1), model)
    assert list(stream(asked("The cat", max_new_tokens=fits, stop=("never",)), model))[-1].finished


def test_prompts_from_a_file(model: Pretrained, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "The cat", "completion": "ignored"}', "", '{"text": "One\u2028fish"}', '{"prompt": "Das K"}\r']
    path.write_bytes("\ufeff".encode() + "\n".join(lines).encode())  # a byte order mark, and a raw line separator
    direct = generate(asked("A dog", "The cat", "One\u2028fish", "Das K"), model)
    assert generate(asked("A dog", prompt_file=path), model) == direct


def test_a_prompt_file_is_read_once(model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a pipe."""
    path = tmp_path / "prompts.jsonl"
    read_text, reads = Path.read_text, []

    def counted(self: Path, *arguments: Any, **named: Any) -> str:
        reads.append(self)
        return read_text(self, *arguments, **named)

    path.write_text('{"prompt": "The cat"}\n')
    monkeypatch.setattr(Path, "read_text", counted)
    options = asked(prompt_file=path)
    generate(options, model)
    list(stream(options, model))
    prompts = read_prompts(options)
    list(continue_prompts(prompts, options, model))
    assert reads.count(path) == 3


def test_prompts_are_checked_before_the_first_piece(model: Pretrained) -> None:
    for broken, place in (("a\ud800", 1), ("\udcff", 0)):
        with pytest.raises(
            UserError, match=rf"prompt 2 of 3: character {place} is half a surrogate pair, or .* remove"
        ):
            continue_prompts(["The cat", broken, "o"], asked("unread"), model)
    with pytest.raises(UserError, match="shorten it"):
        continue_prompts(["The cat", "The cat " * 20], asked("unread", micro_batch_size=1), model)
    assert list(continue_prompts([], asked("unread"), model)) == []


def test_a_piece_is_what_it_says(model: Pretrained) -> None:
    for piece in stream(asked("The cat", max_new_tokens=1), model):
        assert isinstance(piece, Piece)
        assert (piece.index, piece.finished) == (0, "length")
