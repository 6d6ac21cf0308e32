from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_stream.data.tokenizer import END_OF_TEXT, Tokenizer, add_tokens, files, train_tokenizer
from gptj_stream.errors import UserError

TEXT = "Hello  world,\n\tdon't stop: héllo 日本 🎉 \x00 1234\r\n"


def copy_as_vocab_and_merges(trained: Path, folder: Path) -> Path:
    """The same tokenizer in GPT-2's own two files, where the end of text is an ordinary entry."""
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_text_comes_back_and_batches_agree(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, TEXT]) == [ids, tokenizer.encode(TEXT)]
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_end_of_text_is_the_last_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_id == tokenizer.vocab_size - 1


def test_published_ids(gpt2_folder: Path) -> None:
    tokenizer = Tokenizer.load(gpt2_folder)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize("text", [f"a{END_OF_TEXT}b", f"{END_OF_TEXT}b", f" {END_OF_TEXT}", END_OF_TEXT * 2])
def test_a_control_token_in_text_is_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == text + END_OF_TEXT


def test_stream_withholds_unfinished_characters(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    steps = [stream.step(i) for i in tokenizer.encode(TEXT)]
    assert "" in steps
    assert "".join(steps) == TEXT
    assert not any("\ufffd" in step for step in steps)
    assert stream.flush() == ""


@given(text=st.text(min_size=1), data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_flushed_stream_has_given_what_decode_gives(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    ids = ids[: data.draw(st.integers(1, len(ids)))]
    stream = tokenizer.stream()
    assert "".join([*map(stream.step, ids), stream.flush()]) == tokenizer.decode(ids)


def test_fingerprint_tells_tokenizers_apart(trained_folder: Path, tmp_path: Path) -> None:
    first = Tokenizer.load(trained_folder)
    assert first.fingerprint == Tokenizer.load(trained_folder).fingerprint
    folder = copy_as_vocab_and_merges(trained_folder, tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<|extra|>": first.vocab_size}))
    assert Tokenizer.load(folder).fingerprint != first.fingerprint


def test_vocab_and_merges_give_the_same_ids(trained_folder: Path, tmp_path: Path) -> None:
    whole = Tokenizer.load(trained_folder)
    parts = Tokenizer.load(copy_as_vocab_and_merges(trained_folder, tmp_path))
    assert parts.encode(TEXT) == whole.encode(TEXT)
    assert (parts.eos_token_id, parts.vocab_size) == (whole.eos_token_id, whole.vocab_size)


def test_added_tokens(trained_folder: Path, tmp_path: Path) -> None:
    folder = copy_as_vocab_and_merges(trained_folder, tmp_path)
    size = Tokenizer.load(folder).vocab_size
    names = {f"<|extratoken_{i}|>": size + i - 1 for i in range(1, 12)}
    (folder / "added_tokens.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == size + 11
    assert tokenizer.encode("<|extratoken_10|>") == [size + 9]

    (folder / "added_tokens.json").write_text(json.dumps({"<|extratoken_1|>": size + 5}))
    with pytest.raises(UserError, match=rf"'<\|extratoken_1\|>' has id {size + 5}, but {size} is the next free one"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("value", ["A", {"content": "A", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eos_token_is_read(trained_folder: Path, tmp_path: Path, name: str, value: object) -> None:
    shutil.copy(trained_folder / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "A"


def test_limits_saved_in_a_tokenizer_file_do_not_cut_documents(trained_folder: Path, tmp_path: Path) -> None:
    values = json.loads((trained_folder / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode(TEXT)) == TEXT


def test_missing_and_damaged_files(trained_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer; it needs tokenizer\.json, or vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer files cannot be read"):
        Tokenizer.load(tmp_path)
    shutil.copy(trained_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(UserError, match="eos_token '<none>' is not in the vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object, found a list"):
        Tokenizer.load(tmp_path)


def test_files_to_carry_over(trained_folder: Path, tmp_path: Path) -> None:
    assert [path.name for path in files(trained_folder)] == ["tokenizer.json", "tokenizer_config.json"]
    assert files(tmp_path) == []


def test_train(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["", "the cat sat on the mat " * 3]), 262, tmp_path / "new")
    assert tokenizer.vocab_size == 262
    assert tokenizer.eos_token_id == 261
    assert len(tokenizer.encode(" the")) < 4
    assert Tokenizer.load(tmp_path / "new").fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]

    with pytest.raises(UserError, match="vocab_size 256 is below 257"):
        train_tokenizer(iter(["text"]), 256, tmp_path / "other")
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(["", ""]), 300, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_transformers_reads_what_we_train(trained_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(trained_folder)
    ours = Tokenizer.load(trained_folder)
    ids = ours.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos_token_id
    assert len(theirs) == ours.vocab_size


class TestAddTokens:
    """Spare tokens renamed: the ids stay, for us and for transformers."""

    @pytest.fixture(params=["one file", "two files"])
    def folder(self, request: pytest.FixtureRequest, trained_folder: Path, tmp_path: Path) -> Path:
        """With five spare tokens, as GPT-J has 143."""
        size = Tokenizer.load(trained_folder).vocab_size
        names = [f"<|extratoken_{i}|>" for i in range(1, 6)]
        if request.param == "two files":
            folder = copy_as_vocab_and_merges(trained_folder, tmp_path)
            (folder / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(names)}))
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
            return folder
        from transformers import AutoTokenizer  # noqa: PLC0415  (seconds)

        theirs = AutoTokenizer.from_pretrained(trained_folder)
        theirs.add_tokens(names)
        theirs.save_pretrained(tmp_path)
        return tmp_path

    def test_new_names(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415  (seconds)

        before = Tokenizer.load(folder)
        size = before.vocab_size
        assert add_tokens(folder, ["<|sep|>", "<|user|>"]) == {"<|sep|>": size - 5, "<|user|>": size - 4}
        tokenizer = Tokenizer.load(folder)
        assert (tokenizer.vocab_size, len(tokenizer.spare_tokens())) == (size, 3)
        expected = [*before.encode(TEXT), size - 5, *before.encode("b"), size - 4, size - 3]
        text = f"{TEXT}<|sep|>b<|user|><|extratoken_3|>"
        assert tokenizer.encode(text) == expected
        assert AutoTokenizer.from_pretrained(folder)(text).input_ids == expected

    @pytest.mark.parametrize(
        "names", [["<|x|>", "<|x|>"], [" "], ["<|extratoken_2|>"], ["<|extratoken_99|>"], [END_OF_TEXT], ["a"]]
    )
    def test_names_that_cannot_be(self, names: list[str], folder: Path) -> None:
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=r"is empty or given twice|is a token already, or a spare one's name"):
            add_tokens(folder, names)
        with pytest.raises(UserError, match=r"6 names for 5 spare tokens"):
            add_tokens(folder, [f"<|{i}|>" for i in range(6)])
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_a_spare_token_in_use_stays(self, folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"pad_token": "<|extratoken_1|>"}))
        size = Tokenizer.load(folder).vocab_size
        assert add_tokens(folder, ["<|sep|>"]) == {"<|sep|>": size - 4}
        assert json.loads(path.read_text())["pad_token"] == "<|extratoken_1|>"
