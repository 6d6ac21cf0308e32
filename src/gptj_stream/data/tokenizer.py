"""Text to token ids and back: byte-level BPE as GPT-2 defined it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gptj_stream.errors import UserError
from gptj_stream.files import read_json, write_text

END_OF_TEXT = "<|endoftext|>"
SPARE = re.compile(r"<\|extratoken_\d+\|>")

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)


class Tokenizer:
    """A checkpoint's tokenizer.

    Text is data: a control token spelled out in it (`<|endoftext|>`) is encoded as the characters it is made of, so
    no document can end itself or another.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str) -> None:
        """`eos_token` must be in the backend's vocabulary."""
        eos_token_id = backend.token_to_id(eos_token)
        assert eos_token_id is not None
        # A vocab.json lists the end of text among ordinary tokens; only a special one can be told from text.
        backend.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
        backend.encode_special_tokens = True
        # A tokenizer.json may carry the limits it was last called with, and would cut documents silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token_id: int = eos_token_id

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, or else `vocab.json` + `merges.txt` (+ `added_tokens.json`).

        Raises:
            UserError: the files are missing or damaged, or the end-of-text token is not in the vocabulary.
        """
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        try:
            if (folder / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            elif vocab.is_file() and merges.is_file():
                backend = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
                if (folder / "added_tokens.json").is_file():
                    _add_tokens(backend, folder / "added_tokens.json")
            else:
                raise UserError(f"{folder}: no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt")
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: the tokenizer files cannot be read ({reason}); fetch them again") from None
        eos_token = _eos_token(folder)
        if backend.token_to_id(eos_token) is None:
            raise UserError(
                f"{folder}: eos_token {eos_token!r} is not in the vocabulary; name one in tokenizer_config.json"
            )
        return cls(backend, eos_token)

    @cached_property
    def vocab_size(self) -> int:
        """Rows that a model needs for every id, added tokens included: the largest id + 1."""
        return 1 + max(self.vocabulary().values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a document becomes."""
        return hashlib.sha256(f"{self._backend.to_str()}\n{self.eos_token_id}".encode()).hexdigest()

    def vocabulary(self) -> dict[str, int]:
        """Every token's id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def spare_tokens(self) -> list[str]:
        """Tokens without a meaning, `<|extratoken_1|>` and so on, by id."""
        vocabulary = self.vocabulary()
        return sorted((token for token in vocabulary if SPARE.fullmatch(token)), key=vocabulary.__getitem__)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and nothing else: no token is put before or after."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        # "fast" leaves out the character offsets
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one at a time."""
        return TextStream(self._backend)


class TextStream:
    """Decodes ids one at a time, and withholds a character until all of its bytes are there."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._decoder = decoders.DecodeStream(skip_special_tokens=False)
        self._withheld: list[int] = []

    def step(self, token_id: int) -> str:
        """The text that `token_id` completes; none while a character is unfinished."""
        text = self._decoder.step(self._backend, token_id)
        self._withheld = [*self._withheld, token_id] if text is None else []
        return text or ""

    def flush(self) -> str:
        """What was withheld, at the end of the ids: U+FFFD stands for an unfinished character, as in `decode`."""
        return self._backend.decode(self._withheld, skip_special_tokens=False)


def files(folder: Path) -> list[Path]:
    """The tokenizer's files in `folder`, which a checkpoint made from it carries over."""
    return [folder / name for name in FILES if (folder / name).is_file()]


def add_tokens(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Rename the first spare tokens in the tokenizer's files; returns the ids of the new names.

    Raises:
        UserError: a name that is a token already, or more names than spare tokens; the files are as before.
    """
    tokenizer = Tokenizer.load(folder)
    vocabulary = tokenizer.vocabulary()
    for name in names:
        if not name.strip() or names.count(name) > 1:
            raise UserError(f"{folder}: {name!r} is empty or given twice; choose another name")
        if name in vocabulary or SPARE.fullmatch(name):
            raise UserError(f"{folder}: {name!r} is a token already, or a spare one's name; choose another name")
    used = _special_tokens(folder)
    spare = [token for token in tokenizer.spare_tokens() if token not in used]
    if len(names) > len(spare):
        raise UserError(f"{folder}: {len(names)} names for {len(spare)} spare tokens (<|extratoken_N|>); give fewer")
    renamed = dict(zip(spare, names, strict=False))
    changed = {}
    for path in files(folder):
        if path.suffix == ".json":
            before = read_json(path)
            after = _renamed(before, renamed)
            if after != before:
                changed[path] = json.dumps(after, indent=2) + "\n"  # in ASCII, which any file can hold
    originals = {path: path.read_text(encoding="utf-8") for path in changed}
    try:
        for path, text in changed.items():
            write_text(path, text)
    except BaseException:
        for path, text in originals.items():
            write_text(path, text)
        raise
    return {name: vocabulary[token] for token, name in renamed.items()}


def _special_tokens(folder: Path) -> set[str]:
    """Names that the tokenizer's configuration has a use for: padding, separators and so on."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            collect(value.get("content"))
        elif isinstance(value, list):
            for each in value:
                collect(each)

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        for key, value in values.items():
            if key.endswith(("_token", "_special_tokens")):
                collect(value)
    return found


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A JSON value with every key and string that is one of `names` replaced."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(each, names) for key, each in value.items()}
    return value


def train_tokenizer(texts: Iterator[str], vocab_size: int, output: Path) -> Tokenizer:
    """Learn a GPT-2-style byte-level BPE from `texts` and write it to `output`, in Hugging Face's layout.

    `<|endoftext|>` gets the last id, as in GPT-2. Texts with fewer distinct pairs than `vocab_size` asks for give a
    smaller vocabulary.

    Raises:
        UserError: no text, or a `vocab_size` below 257.
    """
    smallest = 256 + 1  # every byte, and the end of text
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is below {smallest} (256 bytes and {END_OF_TEXT}); use {smallest} or more"
        )
    texts = (text for text in texts if text)
    first = next(texts, None)
    if first is None:
        raise UserError("no text to train a tokenizer on; name files with text")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend = _byte_level(models.BPE())
    backend.train_from_iterator(chain([first], texts), trainer)
    backend.add_special_tokens([END_OF_TEXT])  # afterwards: the trainer would give it the first id
    tokenizer = Tokenizer(backend, END_OF_TEXT)

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # decode gives back the text that was encoded
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(output / "tokenizer.json", backend.to_str(pretty=True))
    return tokenizer


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Add an `added_tokens.json`'s {text: id}; the library numbers tokens itself, so the ids are checked."""
    for token, token_id in sorted(read_json(path).items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        given = backend.token_to_id(token)
        if given != token_id:
            raise UserError(
                f"{path}: {token!r} has id {token_id}, but {given} is the next free one; number them without gaps"
            )


def _eos_token(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        eos_token = read_json(path).get("eos_token") if path.is_file() else None
        if isinstance(eos_token, dict):  # a serialized AddedToken
            eos_token = eos_token.get("content")
        if isinstance(eos_token, str):
            return eos_token
    return END_OF_TEXT
